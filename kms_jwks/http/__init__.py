"""The HTTP layer: one table of routes, small endpoint functions, a Flask app that adapts them, gunicorn that serves."""
