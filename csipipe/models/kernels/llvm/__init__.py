"""CRBlock and the small convolutions on a CPU: code that LLVM generates for the machine."""
