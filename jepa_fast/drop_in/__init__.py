"""Pieces with the constructors, buffers and signatures of the code they replace, to be dropped in by hand."""
