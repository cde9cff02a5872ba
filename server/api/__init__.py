"""HTTP: routes, schemas, errors, and what guards them."""
