"""Simulated Job controller: creates pods, counts failures, and sets the conditions of Jobs."""

import copy
import itertools
from datetime import datetime
from typing import Any

import sample_objects
from api_kinds import Key, Object
from api_server import ApiServer, owner_references
from api_writes import WriteOptions
from simulated_kubelet import Kubelet, SimulatedClock, is_finished

MANAGER = "kube-controller-manager"
FINISHED = {"Complete", "Failed"}
LETTERS = "bcdfghjklmnpqrstvwxz"


class JobController:
    """Creates one pod at a time for each Job, or for each index of an Indexed Job with `completions: parallelism`."""

    def __init__(self, server: ApiServer, clock: SimulatedClock, kubelet: Kubelet) -> None:
        self._server, self._clock, self._kubelet = server, clock, kubelet
        self._counted: set[str] = set()
        self._numbers = itertools.count()

    def step(self) -> None:
        """Act on all Jobs once."""
        objects = self._server.objects.list_all()
        for job in [obj for obj in objects if obj["kind"] == "Job"]:
            uid = job["metadata"]["uid"]
            pods = [obj for obj in objects if obj["kind"] == "Pod" and _owner(obj) == uid]
            if _is_finished(job):
                self._delete_expired(job)
            elif "deletionTimestamp" not in job["metadata"]:
                self._sync(job, pods)

    def _sync(self, job: Object, pods: list[Object]) -> None:
        if target := _target(job):
            self._end(job, target, pods)
            return
        if job["spec"].get("suspend"):
            self._suspend(job, pods)
            return
        outcome = self._count(job, pods)
        failed = outcome.get("failed", job["status"].get("failed", 0))
        if "kind" in outcome:
            self._finish(job, pods, **outcome)
        elif failed > job["spec"].get("backoffLimit", 6):
            message = "Job has reached the specified backoff limit"
            self._finish(job, pods, "Failed", "BackoffLimitExceeded", message, failed=failed)
        elif self._is_past_deadline(job):
            message = "Job was active longer than specified deadline"
            self._finish(job, pods, "Failed", "DeadlineExceeded", message, failed=failed)
        else:
            self._run_pods(job, pods, outcome)

    def _count(self, job: Object, pods: list[Object]) -> Object:
        """Count the pods that finished since the last step, and return how the Job finishes, if it does."""
        failed = job["status"].get("failed", 0)
        for pod in pods:
            if not is_finished(pod) or pod["metadata"]["uid"] in self._counted:
                continue
            self._counted.add(pod["metadata"]["uid"])
            if pod["status"]["phase"] == "Succeeded":
                continue
            action, message = _policy_action(job, pod)
            failed += action != "Ignore"
            if action == "FailJob":
                return {"kind": "Failed", "reason": "PodFailurePolicy", "message": message, "failed": failed}
        return {"failed": failed, **_success(job, pods)}

    def _run_pods(self, job: Object, pods: list[Object], status: Object) -> None:
        """Create a pod for each index that needs one, and show the number of pods in the status."""
        unfinished = [pod for pod in pods if not is_finished(pod)]
        terminating = [pod for pod in unfinished if "deletionTimestamp" in pod["metadata"]]
        replaces_early = job["spec"].get("podReplacementPolicy") == "TerminatingOrFailed"
        occupying = [pod for pod in unfinished if not replaces_early or pod not in terminating]
        occupied = {sample_objects.completion_index(pod) for pod in occupying} | _succeeded_indexes(pods)
        created = [self._create_pod(job, index) for index in _indexes(job) if index not in occupied]
        status |= {"active": len(unfinished) - len(terminating) + len(created), "terminating": len(terminating)}
        status["ready"] = sum(_is_running(pod) for pod in unfinished)
        status["startTime"] = job["status"].get("startTime", self._clock.timestamp())
        if _is_suspended(job):
            resumed = self._condition("Suspended", "JobResumed", "Job resumed", "False")
            status["conditions"] = _with_condition(job, resumed)
        self._patch(job, status)

    def _create_pod(self, job: Object, index: int | None) -> None:
        template = copy.deepcopy(job["spec"]["template"])
        number = next(self._numbers)
        suffix = "".join(LETTERS[number // len(LETTERS) ** digit % len(LETTERS)] for digit in range(4, -1, -1))
        prefix = job["metadata"]["name"] + ("" if index is None else f"-{index}")
        metadata = {**template["metadata"], "name": f"{prefix}-{suffix}"}
        metadata |= {"namespace": job["metadata"]["namespace"], "ownerReferences": owner_references(job)}
        metadata["generateName"] = f"{prefix}-"
        pod_spec = template["spec"]
        if index is not None:
            sample_objects.add_completion_index(metadata, pod_spec, prefix, index)
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod_spec}
        key = Key("Pod", metadata["namespace"], metadata["name"])
        created = self._server.writes.create(key, body, WriteOptions(MANAGER)).object
        self._server.patch("Pod", key.name, {"status": {"phase": "Pending"}}, namespace=key.namespace)
        self._kubelet.track(created)

    def _suspend(self, job: Object, pods: list[Object]) -> None:
        self._delete_pods(pods)
        suspended = [] if _is_suspended(job) else [self._condition("Suspended", "JobSuspended", "Job suspended")]
        conditions = _with_condition(job, *suspended)
        terminating = sum(not is_finished(pod) for pod in pods)
        status = {"conditions": conditions, "active": 0, "ready": 0, "terminating": terminating, "startTime": None}
        self._patch(job, status)

    def _delete_pods(self, pods: list[Object]) -> None:
        for pod in pods:
            if not is_finished(pod) and "deletionTimestamp" not in pod["metadata"]:
                self._server.deletion.delete(Key("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"]), {})

    def _finish(self, job: Object, pods: list[Object], kind: str, reason: str, message: str, **status: Any) -> None:
        """Set the condition that announces the end of a Job; the end itself follows when its pods have ended."""
        criterion = "SuccessCriteriaMet" if kind == "Complete" else "FailureTarget"
        conditions = _with_condition(job, self._condition(criterion, reason, message))
        self._patch(job, {"conditions": conditions} | status)
        job["status"] = job["status"] | status | {"conditions": conditions}
        self._end(job, conditions[-1], pods)

    def _end(self, job: Object, target: Object, pods: list[Object]) -> None:
        """Delete the remaining pods of a Job that has met its success or failure criteria, and then finish it."""
        self._delete_pods(pods)
        if len(_indexes(job)) > 1 and (left := [pod for pod in pods if not is_finished(pod)]):
            self._patch(job, {"active": 0, "ready": 0, "terminating": len(left)})
            return
        kind = "Complete" if target["type"] == "SuccessCriteriaMet" else "Failed"
        conditions = _with_condition(job, self._condition(kind, target["reason"], target["message"]))
        completion = {"completionTime": self._clock.timestamp()} if kind == "Complete" else {}
        self._patch(job, {"conditions": conditions, "active": 0, "ready": 0, "terminating": 0} | completion)

    def _delete_expired(self, job: Object) -> None:
        ttl = job["spec"].get("ttlSecondsAfterFinished")
        finished = next(
            item["lastTransitionTime"] for item in _conditions(job) if item["type"] in {"Complete", "Failed"}
        )
        is_deleted = "deletionTimestamp" in job["metadata"]
        if ttl is not None and not is_deleted and self._seconds_since(finished) >= ttl:
            key = Key("Job", job["metadata"]["namespace"], job["metadata"]["name"])
            self._server.deletion.delete(key, {"propagationPolicy": "Foreground"})

    def _is_past_deadline(self, job: Object) -> bool:
        deadline, started = job["spec"].get("activeDeadlineSeconds"), job["status"].get("startTime")
        return bool(deadline and started and self._seconds_since(started) > deadline)

    def _seconds_since(self, timestamp: str) -> float:
        now, then = (datetime.fromisoformat(text) for text in (self._clock.timestamp(), timestamp))
        return (now - then).total_seconds()

    def _condition(self, kind: str, reason: str, message: str, status: str = "True") -> Object:
        now = self._clock.timestamp()
        fields = {"type": kind, "status": status, "lastProbeTime": now, "lastTransitionTime": now}
        return fields | {"reason": reason, "message": message}

    def _patch(self, job: Object, status: Object) -> None:
        self._server.patch("Job", job["metadata"]["name"], {"status": status}, namespace=job["metadata"]["namespace"])


def _indexes(job: Object) -> list[int | None]:
    """Return the completion indexes of a Job; a single None if it is not an Indexed Job."""
    if job["spec"].get("completionMode") != "Indexed":
        return [None]
    assert job["spec"]["completions"] == job["spec"]["parallelism"], "not simulated: fewer pods than completions"
    return [*range(job["spec"]["completions"])]


def _succeeded_indexes(pods: list[Object]) -> set[int | None]:
    return {sample_objects.completion_index(pod) for pod in pods if pod["status"]["phase"] == "Succeeded"}


def _success(job: Object, pods: list[Object]) -> Object:
    """Return how a Job succeeds: by its success policy, or because all its indexes have; empty if it does not yet."""
    succeeded = _succeeded_indexes(pods)
    status: Object = {"succeeded": len(succeeded)} if succeeded else {}
    for number, rule in enumerate(job["spec"].get("successPolicy", {}).get("rules", [])):
        if {int(index) for index in rule["succeededIndexes"].split(",")} <= succeeded:
            message = f"Matched rules at index {number}"
            return status | {"kind": "Complete", "reason": "SuccessPolicy", "message": message}
    if succeeded >= {*_indexes(job)}:
        message = "Reached expected number of succeeded pods"
        return status | {"kind": "Complete", "reason": "CompletionsReached", "message": message}
    return status


def _policy_action(job: Object, pod: Object) -> tuple[str, str]:
    """Return the action of the first rule of spec.podFailurePolicy that matches a failed pod, and its message."""
    for index, rule in enumerate(job["spec"].get("podFailurePolicy", {}).get("rules", [])):
        for status in pod["status"].get("initContainerStatuses", []) + pod["status"].get("containerStatuses", []):
            code = status["state"].get("terminated", {}).get("exitCode", 0)
            if code and _matches_exit_code(rule.get("onExitCodes"), status["name"], code):
                name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
                message = f"Container {status['name']} for pod {name} failed with exit code {code} matching "
                return rule["action"], f"{message}{rule['action']} rule at index {index}"
        conditions = {(item["type"], item["status"]) for item in pod["status"].get("conditions", [])}
        if any((item["type"], item.get("status", "True")) in conditions for item in rule.get("onPodConditions", [])):
            return rule["action"], ""
    return "Count", ""


def _matches_exit_code(requirement: Object | None, container: str, code: int) -> bool:
    if requirement is None or requirement.get("containerName", container) != container:
        return False
    return (code in requirement["values"]) == (requirement["operator"] == "In")


def _owner(pod: Object) -> str | None:
    return next((owner["uid"] for owner in pod["metadata"].get("ownerReferences", []) if owner.get("controller")), None)


def _conditions(job: Object) -> list[Object]:
    return list(job["status"].get("conditions", []))


def _with_condition(job: Object, *changed: Object) -> list[Object]:
    kinds = {condition["type"] for condition in changed}
    return [item for item in _conditions(job) if item["type"] not in kinds] + list(changed)


def _target(job: Object) -> Object | None:
    """Return the condition that announces the end of a Job."""
    kinds = {"SuccessCriteriaMet", "FailureTarget"}
    return next((item for item in _conditions(job) if item["type"] in kinds and item["status"] == "True"), None)


def _is_finished(job: Object) -> bool:
    return any(item["type"] in FINISHED and item["status"] == "True" for item in _conditions(job))


def _is_suspended(job: Object) -> bool:
    return any(item["type"] == "Suspended" and item["status"] == "True" for item in _conditions(job))


def _is_running(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
