"""A GPU that is not there: tensors that say "cuda" and lie in the host's memory, and as much of torch.cuda as we call.

Code written for a GPU runs on it as it is, its kernels under Triton's interpreter, and is told what a GPU would do to
it: tensors of two devices in one operation, waiting where nobody may, host memory that changes under an asynchronous
copy, memory that is read before it is written. What it cannot show: speed, and how streams run beside each other.

    TRITON_INTERPRET=1 python -m pytest -p stand_in.plugin tests/model/test_gpu.py
"""
