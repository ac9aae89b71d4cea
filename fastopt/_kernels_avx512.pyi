from fastopt._kernels_baseline import ISA as ISA
from fastopt._kernels_baseline import TABLE as TABLE
