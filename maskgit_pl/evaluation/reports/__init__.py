"""The tables and figures of the paper, with our rows in them."""
