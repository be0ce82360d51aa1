"""Pure functions from orders to orders, one a file."""
