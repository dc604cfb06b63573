"""k8s/base: namespace, service account and role for jobs, and templates for the Secret and a quota."""

from collections.abc import Iterator

from chart_objects import chart_objects
from objects import LABELS, NAMESPACE, TEMPLATE_SUFFIX, kustomization, metadata, to_yaml

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import GPU_RESOURCE, STORAGE_SECRET

SUBMITTER_ROLE, SUBMITTER_GROUP, SERVICE_ACCOUNT = "topwork-submitter", "topwork-submitters", "topwork-job"
RBAC_GROUP = "rbac.authorization.k8s.io"
SECRET_FILE, QUOTA_FILE = f"secret{TEMPLATE_SUFFIX}", f"quota{TEMPLATE_SUFFIX}"

KUSTOMIZATION_COMMENT = f"""
Objects that a namespace needs once:

  kubectl apply -k k8s/base

Then create the Secret {STORAGE_SECRET} (see {SECRET_FILE}), and run a job with the controller:

  kubectl apply --server-side -k k8s/controller
  kubectl apply -f examples/NAME.yaml -n {NAMESPACE}

or without it:

  kubectl apply -f k8s/examples/NAME.yaml

{SECRET_FILE} and {QUOTA_FILE} are templates to complete. They are not applied with this directory.
"""
NAMESPACE_COMMENT = (
    "The namespace of the jobs. It enforces the restricted Pod Security Standard, which the pods of topwork meet."
)
SERVICE_ACCOUNT_COMMENT = f"""
The service account of jobs that access storage with workload identity instead of the Secret {STORAGE_SECRET}. Add the
annotations that your cloud provider requires, such as eks.amazonaws.com/role-arn, and set it in the job spec:

  compute: {{serviceAccountName: {SERVICE_ACCOUNT}}}

Pods of jobs never mount a Kubernetes API token.
"""
SUBMITTER_COMMENT = f"""
Permissions that topwork submit, status, list, logs, top and cancel need in this namespace, granted to the group
{SUBMITTER_GROUP}. To grant them to a user:

  kubectl --namespace {NAMESPACE} create rolebinding NAME --role={SUBMITTER_ROLE} --user=NAME
"""
SECRET_COMMENT = f"""
Endpoint and credentials of object storage, as AWS environment variables. This is a template without values, which is
not applied with this directory. Write NAME=value lines to a file outside this repository and run

  kubectl --namespace {NAMESPACE} create secret generic {STORAGE_SECRET} --from-env-file=FILE

or complete a copy of this file and run kubectl apply -f COPY. For Amazon S3, omit AWS_ENDPOINT_URL. With workload
identity, no Secret is required: see service-account.yaml.
"""
QUOTA_COMMENT = f"""
Total resources of all jobs in the namespace. This is an example, which is not applied with this directory. Change the
quantities and run

  kubectl apply -f k8s/base/{QUOTA_FILE}

If the quota is exhausted, Kubernetes creates the pods of a Job later, and topwork status explains why they are missing.
"""


def files() -> Iterator[tuple[str, str]]:
    """Yield the name and the content of each file."""
    resources = {
        "namespace.yaml": to_yaml(NAMESPACE_COMMENT, namespace()),
        "service-account.yaml": to_yaml(SERVICE_ACCOUNT_COMMENT, service_account()),
        "submitter.yaml": to_yaml(SUBMITTER_COMMENT, role(), role_binding()),
    }
    yield from resources.items()
    yield "kustomization.yaml", to_yaml(KUSTOMIZATION_COMMENT, kustomization(*resources))
    yield SECRET_FILE, to_yaml(SECRET_COMMENT, secret())
    yield QUOTA_FILE, to_yaml(QUOTA_COMMENT, quota())


def namespace() -> KubernetesObject:
    """Build the namespace."""
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": LABELS | levels}}


def service_account() -> KubernetesObject:
    """Build the service account of jobs."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(SERVICE_ACCOUNT),
        "automountServiceAccountToken": False,
    }


def role() -> KubernetesObject:
    """Build the role of submitters, with the rules of the chart."""
    return {
        "apiVersion": f"{RBAC_GROUP}/v1",
        "kind": "Role",
        "metadata": metadata(SUBMITTER_ROLE),
        "rules": chart_objects("")["submitter-role.yaml"]["rules"],
    }


def role_binding() -> KubernetesObject:
    """Build the binding of the role to the group of submitters."""
    return {
        "apiVersion": f"{RBAC_GROUP}/v1",
        "kind": "RoleBinding",
        "metadata": metadata(SUBMITTER_ROLE),
        "roleRef": {"apiGroup": RBAC_GROUP, "kind": "Role", "name": SUBMITTER_ROLE},
        "subjects": [{"apiGroup": RBAC_GROUP, "kind": "Group", "name": SUBMITTER_GROUP}],
    }


def secret() -> KubernetesObject:
    """Build the Secret for object storage, without values."""
    names = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata(STORAGE_SECRET),
        "type": "Opaque",
        "stringData": dict.fromkeys(names, ""),
    }


def quota() -> KubernetesObject:
    """Build an example quota."""
    hard = {
        "requests.cpu": 32,
        "requests.memory": "128Gi",
        "limits.cpu": 32,
        "limits.memory": "128Gi",
        f"requests.{GPU_RESOURCE}": 4,
        "count/jobs.batch": 50,
    }
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata("topwork"), "spec": {"hard": hard}}
