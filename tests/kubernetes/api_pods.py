"""Subresources of pods of the API server used in tests: logs, and the proxy to a port."""

import urllib.request
from urllib.parse import unquote

import api_logs
import api_statuses
from api_connection import TRUE, ConnectionHandler
from api_paths import Target
from api_statuses import ApiError


class PodHandler(ConnectionHandler):
    """Serves the subresources of pods."""

    def _proxy(self, target: Target) -> None:
        """Forward a request to a pod port if a test has set its local port."""
        name, _, port = unquote(target.name).partition(":")
        if self.api.objects.get(target.key._replace(name=name)) is None:
            raise ApiError(api_statuses.not_found("pods", name))
        local_port = self.api.pod_ports.get((name, int(port)))
        try:
            if local_port is None:
                raise ConnectionRefusedError(111, "connect: connection refused")
            path = target.subresource.removeprefix("proxy/")
            headers = {"Accept": self.headers.get("Accept", "*/*")}
            request = urllib.request.Request(f"http://127.0.0.1:{local_port}/{path}", headers=headers)
            with urllib.request.urlopen(request, timeout=60) as response:
                data, content_type = response.read(), response.headers["Content-Type"]
        except OSError as error:
            message = f"error trying to reach service: dial tcp 10.0.0.7:{port}: {error.strerror or error}"
            raise ApiError(api_statuses.status(503, "ServiceUnavailable", message)) from None
        self._send_bytes(200, data, {"Content-Type": content_type})

    def _log(self, target: Target) -> None:
        pod = self.api.objects.get(target.key)
        if pod is None:
            raise ApiError(api_statuses.not_found("pods", target.name))
        container = self.query.get("container", "")
        if not api_logs.has_container(pod, container):
            raise ApiError(api_statuses.bad_request(f"container {container} is not valid for pod {target.name}"))
        if self.query.get("previous") in TRUE:
            message = f'previous terminated container "{container}" in pod "{target.name}" not found'
            raise ApiError(api_statuses.bad_request(message))
        log, state = self.api.logs.get(target.name, container), api_logs.container_state(pod, container)
        if "waiting" in (state or {}) or (log is None and not state):
            reason = (state or {}).get("waiting", {}).get("reason", "PodInitializing")
            raise ApiError(api_statuses.container_waiting(container, target.name, reason))
        log = log or api_logs.Log()
        self._begin_stream("text/plain")
        with self.api.objects.changed:
            lines, position = api_logs.select_lines(log, self.query), len(log.lines)
        self._send_lines(lines)
        if self.query.get("follow") in TRUE:
            self._follow_log(target, container, position)
        self._end_stream()

    def _follow_log(self, target: Target, container: str, position: int) -> None:
        while True:
            with self.api.objects.changed:
                log = self.api.logs.get(target.name, container) or api_logs.Log()
                lines, position = log.lines[position:], len(log.lines)
                if not lines:
                    pod = self.api.objects.get(target.key)
                    is_terminated = pod is None or "terminated" in (api_logs.container_state(pod, container) or {})
                    if log.ended or is_terminated or self.api.is_closing or self._is_client_gone():
                        return
                    self.api.objects.changed.wait(0.1)
                    continue
            self._send_lines(lines)

    def _send_lines(self, lines: list[tuple[str, str]]) -> None:
        with_timestamps = self.query.get("timestamps") in TRUE
        for timestamp, line in lines:
            self._send_chunk((f"{timestamp} {line}" if with_timestamps else line).encode() + b"\n")
