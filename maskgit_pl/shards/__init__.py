"""The data format: WebDataset tars with a manifest beside them, read by index; and the token store.

Nothing is imported here: ``shards.manifest`` must answer without torch, PIL and webdataset.
"""
