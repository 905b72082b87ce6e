"""The backend for AWS KMS: keys of one account and region, and of others that let it use theirs."""

from kms_jwks.backends.aws_kms.backend import AwsKmsBackend
from kms_jwks.backends.aws_kms.options import AwsKmsOptions

__all__ = ["AwsKmsBackend", "AwsKmsOptions"]
