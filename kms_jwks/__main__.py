"""`python -m kms_jwks` is the same program as `kms-jwks`."""

from kms_jwks.cli import main

if __name__ == "__main__":
    main()
