"""Choose the GEMM kernel of each linear layer and number of rows by measuring on the GPU at hand."""
