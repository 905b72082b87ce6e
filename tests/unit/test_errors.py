"""The error tree: one class, one code, one title; the drawing in the docstring is the tree."""

import re

import pytest

from kms_jwks import errors
from kms_jwks.errors import BY_CODE, BackendError, Error, TokenExpired


def every_class() -> list[type[Error]]:
    found, queue = [], [Error]
    while queue:
        cls = queue.pop()
        queue.extend(cls.__subclasses__())
        if cls.__module__ == errors.__name__:
            found.append(cls)
    return found


CLASSES = sorted(every_class(), key=lambda cls: cls.__name__)
CODED = [cls for cls in CLASSES if cls is not Error]


@pytest.mark.parametrize("cls", CODED, ids=lambda cls: cls.__name__)
def test_every_class_has_a_code_and_a_title_of_its_own(cls: type[Error]) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", cls.code)
    assert cls.title
    assert not cls.title.endswith(".")
    assert "code" in vars(cls), "an inherited code would make two classes one problem type"
    assert "title" in vars(cls)


def test_codes_are_distinct() -> None:
    codes = [cls.code for cls in CODED]
    assert len(codes) == len(set(codes))
    assert {code: cls for code, cls in BY_CODE.items() if cls in CODED} == {cls.code: cls for cls in CODED}


def test_titles_are_distinct() -> None:
    titles = [cls.title for cls in CODED]
    assert len(titles) == len(set(titles))


def drawn_tree() -> dict[str, str]:
    """Class name → the branch of `Error` that the docstring draws it on."""
    assert errors.__doc__ is not None
    names = {cls.__name__ for cls in CLASSES}
    tree, branch = {"Error": "Error"}, "Error"
    for line in errors.__doc__.partition("::")[2].splitlines():
        top = re.match(r"    [├└]── (\w+(?: · \w+)*)", line)
        if top:
            *others, branch = top[1].split(" · ")
            tree.update(zip(others, others, strict=True))
        for word in re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)*\b", line):
            if word in names or sum(letter.isupper() for letter in word) > 1:
                tree.setdefault(word, branch)
    return tree


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    tree = drawn_tree()
    assert set(tree) == {cls.__name__ for cls in CLASSES}
    for name, branch in tree.items():
        cls = getattr(errors, name)
        assert issubclass(cls, getattr(errors, branch)), f"{name} is drawn under {branch}"
        assert (Error in cls.__bases__) is (name == branch != "Error"), f"{name} is drawn on the wrong level"


def test_the_public_classes_are_the_tree() -> None:
    public = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert public == set(CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_can_be_raised_bare_and_says_its_title(cls: type[Error]) -> None:
    with pytest.raises(cls) as caught:
        raise cls
    assert caught.value.detail == cls.title
    assert caught.value.fields == {}
    assert caught.value.retry_after is None


@pytest.mark.parametrize("cls", [c for c in CODED if issubclass(c, BackendError)], ids=lambda cls: cls.__name__)
def test_what_leaves_a_backend_says_whether_to_retry(cls: type[BackendError]) -> None:
    expected = cls.__name__ in {"BackendUnavailable", "BackendThrottled"}
    assert cls.retryable is expected


def test_an_error_carries_what_a_reader_needs() -> None:
    fields = {"exp": 7}
    error = TokenExpired("It expired at 7.", next_step="Get another.", retry_after=3, fields=fields)
    assert (str(error), error.detail, error.next_step, error.retry_after) == (
        "It expired at 7.",
        "It expired at 7.",
        "Get another.",
        3,
    )
    assert error.fields == fields
    assert error.fields is not fields
    assert TokenExpired().next_step == "Do not trust the token."
