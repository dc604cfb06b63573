"""k8s/base: what a namespace needs before its first job, and templates of what has to be filled in."""

from collections.abc import Iterator

from manifests import LABELS, NAMESPACE, TEMPLATE, Manifest, kustomization, metadata, text

from topwork.cluster.names import GPU_RESOURCE, STORAGE_SECRET

SUBMITTER, SUBMITTERS, ACCOUNT = "topwork-submitter", "topwork-submitters", "topwork-job"
RBAC = "rbac.authorization.k8s.io"
SECRET_FILE, QUOTA_FILE = f"secret{TEMPLATE}", f"quota{TEMPLATE}"

KUSTOMIZATION_WORDS = f"""
What the jobs of a namespace need, once:

  kubectl apply -k k8s/base

Then the Secret {STORAGE_SECRET}, see {SECRET_FILE}, and the first job:

  kubectl apply -f k8s/examples/NAME.yaml

{SECRET_FILE} and {QUOTA_FILE} have to be filled in, so that nothing applies them by itself.
"""
NAMESPACE_WORDS = "The namespace of the jobs. Only restricted pods run in it; those of topwork are."
ACCOUNT_WORDS = f"""
The account of jobs that reach their storage by workload identity instead of the Secret {STORAGE_SECRET}. Annotate it as
your cloud wants it, such as with eks.amazonaws.com/role-arn, and name it in the spec:

  compute: {{serviceAccountName: {ACCOUNT}}}

No pod of topwork gets a token of the Kubernetes API.
"""
SUBMITTER_WORDS = f"""
Who may submit: what topwork submit, status, list, logs, top and cancel need in this namespace, for the
group {SUBMITTERS}. To give it to a person or a service account:

  kubectl --namespace {NAMESPACE} create rolebinding NAME --role={SUBMITTER} --user=NAME
"""
SECRET_WORDS = f"""
Address and keys of the storage, in the names that AWS gave them. A template without values, which nothing applies by
itself. Either write NAME=value lines to a file outside of this repository, and

  kubectl --namespace {NAMESPACE} create secret generic {STORAGE_SECRET} --from-env-file=FILE

or fill in a copy of this one there, and kubectl apply -f COPY. On Amazon S3, leave AWS_ENDPOINT_URL out. With workload
identity there is no Secret: see service-account.yaml.
"""
QUOTA_WORDS = f"""
What all jobs of the namespace may have at once. An example, which nothing applies by itself. Change the amounts, and

  kubectl apply -f k8s/base/{QUOTA_FILE}

The pod of a Job for which too little is left is not made, and the Job tries again; topwork status says so.
"""


def files() -> Iterator[tuple[str, str]]:
    """Give each file with its text."""
    resources = {
        "namespace.yaml": text(NAMESPACE_WORDS, namespace()),
        "service-account.yaml": text(ACCOUNT_WORDS, service_account()),
        "submitter.yaml": text(SUBMITTER_WORDS, role(), role_binding()),
    }
    yield from resources.items()
    yield "kustomization.yaml", text(KUSTOMIZATION_WORDS, kustomization(*resources))
    yield SECRET_FILE, text(SECRET_WORDS, secret())
    yield QUOTA_FILE, text(QUOTA_WORDS, quota())


def namespace() -> Manifest:
    """Build the namespace."""
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": LABELS | levels}}


def service_account() -> Manifest:
    """Build the account of jobs."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(ACCOUNT),
        "automountServiceAccountToken": False,
    }


def role() -> Manifest:
    """Build the role of whoever submits: what the commands ask of the API server, and no more."""
    rules = {
        ("batch", "jobs"): "get list watch create patch delete",
        ("", "configmaps"): "get list create patch delete",
        ("", "pods"): "get list watch delete",
        ("", "pods/log"): "get",
        ("", "pods/proxy"): "get",
        ("", "events"): "get list watch",
        ("", "resourcequotas"): "get list",
    }
    return {
        "apiVersion": f"{RBAC}/v1",
        "kind": "Role",
        "metadata": metadata(SUBMITTER),
        "rules": [
            {"apiGroups": [group], "resources": [resource], "verbs": verbs.split()}
            for (group, resource), verbs in rules.items()
        ],
    }


def role_binding() -> Manifest:
    """Give the role to a group."""
    return {
        "apiVersion": f"{RBAC}/v1",
        "kind": "RoleBinding",
        "metadata": metadata(SUBMITTER),
        "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": SUBMITTER},
        "subjects": [{"apiGroup": RBAC, "kind": "Group", "name": SUBMITTERS}],
    }


def secret() -> Manifest:
    """Build the Secret of the storage, without values."""
    names = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata(STORAGE_SECRET),
        "type": "Opaque",
        "stringData": dict.fromkeys(names, ""),
    }


def quota() -> Manifest:
    """Build an example of a quota."""
    hard = {
        "requests.cpu": 32,
        "requests.memory": "128Gi",
        "limits.cpu": 32,
        "limits.memory": "128Gi",
        f"requests.{GPU_RESOURCE}": 4,
        "count/jobs.batch": 50,
    }
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata("topwork"), "spec": {"hard": hard}}
