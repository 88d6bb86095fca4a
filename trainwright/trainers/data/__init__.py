"""The data stream: sources, lanes, packing, and the batches that the loop takes."""
