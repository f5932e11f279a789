"""Sources of ``maskgit data make``: folders and archives of images, IDX and parquet files, data sets of the Hub."""
