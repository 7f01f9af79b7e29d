"""What can be watched while the service runs? Counters, gauges and histograms in the words of Prometheus."""

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(kw_only=True, eq=False)
class Metrics:
    """One registry for one service, so that two of them in a process do not share counts."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        kept: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(**kept)
        self.requests = Counter("effnet_requests", "Answered requests.", ["path", "status"], **kept)
        self.seconds = Histogram(
            "effnet_predict_seconds", "From the head of a /predict request to its answer.", buckets=SECONDS, **kept
        )
        self.images = Counter("effnet_images", "Images by outcome: ok, or the code of the error.", ["outcome"], **kept)
        self.batch = Histogram(
            "effnet_batch_images", "Images that went through the model together.", buckets=BATCHES, **kept
        )
        self.model_seconds = Counter("effnet_model_seconds", "Time that the workers' models took.", **kept)
        self.waiting = Gauge("effnet_waiting_images", "Images that no worker has yet.", **kept)
        self.body_bytes = Gauge("effnet_waiting_bytes", "Bytes of request bodies that are held.", **kept)
        self.workers = Gauge("effnet_workers_ready", "Workers that take images.", **kept)
        self.restarts = Counter("effnet_worker_restarts", "Workers that ended and were replaced.", **kept)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
