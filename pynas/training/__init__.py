"""Everything that a training run needs and a paper does not talk about.

`data` and its neighbours turn image folders into batches, `feed` hands a strategy its next batch, `loop` is the one
loop that searches and trains alike, `train` trains a single network in it, `evaluate` measures accuracy, `where` is the
CPU or the GPU that all of it runs on, `run` is the folder on disk.

To add a data set by name: one entry in `sources.STORED`. To train something new: a class with the members of
`loop.Task`.
"""
