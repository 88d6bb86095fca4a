"""One small file per format of data, each a function from a source's configuration to its documents."""
