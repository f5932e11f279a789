"""The data format: WebDataset tars read by index, and the token store."""
