"""The HDF5 feature store: layout, lock, writer, reader. Knows arrays and ids, no images or torch.

libhdf5 writes a store once, complete and empty (`creating`). Its structure is checked whenever it is opened
(`opening`). Rows arrive by `pwrite` at the datasets' offsets, one checksummed block at a time (`writer`), and
are read back as memory maps (`reader`).
docs/store-format.md is the format's definition.
"""
