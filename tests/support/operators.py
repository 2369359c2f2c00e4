"""Which of torch's operators run, and how often: on a GPU each of them is a call of Python, and some wait for it."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorsCalled(TorchDispatchMode):
    """Counts operators by name while it is open.

    Example:
        with OperatorsCalled() as called:
            torch.ones(2).sum().item()
        assert called.times["_local_scalar_dense"] == 1  # waits for the device
    """

    def __init__(self):
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.times[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))
