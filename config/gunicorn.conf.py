"""The workers alone, under a gunicorn of your own: no custodian runs beside them.

    KMS_JWKS_CONFIG=/etc/kms-jwks/kms-jwks.toml gunicorn -c config/gunicorn.conf.py 'kms_jwks.wiring:wsgi()'

`kms-jwks serve` does the same and starts `kms-jwks custodian` too. Change settings in kms-jwks.toml, not here.
"""

from kms_jwks.config import load_settings
from kms_jwks.http import logs
from kms_jwks.http.server import gunicorn_settings

settings = load_settings()
logs.configure(settings.log_level, settings.log_format)
globals().update(gunicorn_settings(settings))
