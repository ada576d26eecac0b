"""Counters and gauges for Prometheus, in a registry of their own for each application."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from protocol.messages import FederationStatus
from protocol.phases import RoundPhase

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LATENCY_BUCKETS_S = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0)


class Metrics:
    """What `/metrics` shows. Labels name routes and problem types, never agents."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sheepfold_requests_total",
            "Requests answered.",
            ("route", "status"),
            registry=self.registry,
        )
        self.refusals = Counter(
            "sheepfold_refusals_total",
            "Requests refused, by problem type.",
            ("problem",),
            registry=self.registry,
        )
        self.latency_s = Histogram(
            "sheepfold_request_seconds",
            "Time to answer; long polls wait on purpose.",
            ("route",),
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._enrolled = self._gauge("agents_enrolled", "Members.")
        self._present = self._gauge("agents_present", "Members seen of late.")
        self._release = self._gauge("newest_release", "Number of the newest release.")
        self._rounds_done = self._gauge("rounds_published", "Rounds that made a release.")
        self._round = self._gauge("round", "Number of the latest round.")
        self._uploads = self._gauge("round_uploads", "Accepted uploads of the latest round.")
        self._bytes_up = self._gauge("upload_bytes", "Bytes of updates received, ever.")
        self._bytes_down = self._gauge("download_bytes", "Bytes of releases served, ever.")
        self._phase = Gauge(
            "sheepfold_round_phase",
            "1 for the phase of the latest round.",
            ("phase",),
            registry=self.registry,
        )

    def render(self, status: FederationStatus) -> bytes:
        """The text that Prometheus reads.

        Args:
            status: The federation now.
        """
        self._enrolled.set(status.n_enrolled)
        self._present.set(status.n_present)
        self._release.set(status.newest_release)
        self._rounds_done.set(status.n_releases_of_rounds)
        self._bytes_up.set(status.bytes_up)
        self._bytes_down.set(status.bytes_down)
        last = status.round
        self._round.set(0 if last is None else last.round)
        self._uploads.set(0 if last is None else last.n_uploads)
        for phase in RoundPhase:
            self._phase.labels(phase.value).set(last is not None and last.phase is phase)
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"sheepfold_{name}", text, registry=self.registry)
