"""The HTTP interface: routes, schemas, errors, and the checks in front of them."""
