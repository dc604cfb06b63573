"""How long training stood still for want of input: what the wait for batches says on a device that computes aside."""

from dataclasses import dataclass, field


@dataclass
class HoldUps:
    """Steps since the device was last waited for.

    On a processor a step has ended when its call returns, and each wait for a batch is time lost. A GPU is given its
    work and computes aside: the host that waits for a batch meanwhile holds nothing up. So the waits count no further
    than the device can have been idle. It works off the steps one after the other; should each take it c seconds, the
    last one ends at the latest of (start of step k) + c * (steps from k on). The end is seen, which gives c.
    """

    starts: list[float] = field(default_factory=list)
    waited: float = 0.0
    began: float = 0.0

    def step(self, asked: float, start: float) -> None:
        """Note a step.

        Args:
            asked: When its batch was asked for, on the clock of `time.perf_counter`.
            start: When the batch was there, and the device was given its work.
        """
        if not self.starts:
            self.began = asked
        self.starts.append(start)
        self.waited += start - asked

    def settle(self, ended: float) -> tuple[float, float]:
        """Account for the steps, now that the device has done them all, and begin anew.

        Args:
            ended: When it had, on the same clock.

        Returns:
            Seconds in which it stood still for want of input, and seconds in which it computed.
        """
        steps = len(self.starts)
        longest = min(max(ended - start, 0.0) / (steps - index) for index, start in enumerate(self.starts))
        idle = max(ended - self.began - steps * longest, 0.0)
        held = min(self.waited, idle)
        took = ended - self.began
        self.starts, self.waited = [], 0.0
        return held, took - held
