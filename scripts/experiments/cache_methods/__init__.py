"""Cache methods on one bench: what a request costs, and the page that compares them."""
