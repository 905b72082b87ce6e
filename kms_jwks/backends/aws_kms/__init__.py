"""The backend for AWS KMS: keys of one account and region, and keys that other accounts share with it."""

from kms_jwks.backends.aws_kms.backend import AwsKmsBackend

__all__ = ["AwsKmsBackend"]
