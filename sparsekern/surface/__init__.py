"""What torch's functions and methods do with a SparseTensor beside matmul and linear."""
