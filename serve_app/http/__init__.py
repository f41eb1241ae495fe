"""The HTTP interface: FastAPI routes, problem answers, the OpenAPI document; deployment.py is the ingress."""
