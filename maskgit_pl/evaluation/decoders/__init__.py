"""Ways of decoding one model: side by side, and the search for a better one."""
