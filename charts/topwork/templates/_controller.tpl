{{/* Names of the controller, its webhook, and the Secret with the certificate of the webhook. */}}
{{- define "topwork.controller.name" -}}{{ include "topwork.name" (dict "root" . "part" "controller") }}{{- end }}
{{- define "topwork.webhook.name" -}}{{ include "topwork.name" (dict "root" . "part" "webhook") }}{{- end }}
{{- define "topwork.webhook.configuration" -}}{{ include "topwork.clusterName" (dict "root" . "part" "webhook") }}{{- end }}

{{/* Labels of the controller's objects, and labels that select its pods. */}}
{{- define "topwork.controller.labels" -}}
{{- include "topwork.labels" (dict "root" . "name" "topwork-controller") -}}
{{- end }}
{{- define "topwork.controller.selector" -}}
app.kubernetes.io/name: topwork-controller
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Namespaces of the controller's TransferJobs, as a JSON array. Not for controller.clusterWide. */}}
{{- define "topwork.controller.namespaces" -}}
{{- prepend .Values.controller.namespaces .Release.Namespace | uniq | toJson -}}
{{- end }}

{{/* Rules of the controller in each namespace of its TransferJobs. */}}
{{- define "topwork.controller.rules" -}}
- {apiGroups: [topwork.dev], resources: [transfersearches], verbs: [get, list, watch]}
# The trials of a TransferSearch are TransferJobs.
- {apiGroups: [topwork.dev], resources: [transferjobs], verbs: [get, list, watch, create, update, delete]}
- {apiGroups: [topwork.dev], resources: [transferjobs/status, transfersearches/status], verbs: [get, patch]}
# Clusters with the admission plugin OwnerReferencesPermissionEnforcement require it for blockOwnerDeletion.
- {apiGroups: [topwork.dev], resources: [transferjobs/finalizers, transfersearches/finalizers], verbs: [update]}
- {apiGroups: [batch], resources: [jobs], verbs: [get, list, watch, create, patch, delete]}
# The journal of a TransferSearch is updated.
- {apiGroups: [""], resources: [configmaps], verbs: [get, create, update, patch, delete]}
# Host names of the pods of a run on several nodes, and access to their ports.
- {apiGroups: [""], resources: [services], verbs: [get, create, patch, delete]}
- {apiGroups: [networking.k8s.io], resources: [networkpolicies], verbs: [get, create, patch, delete]}
- {apiGroups: [""], resources: [pods], verbs: [get, list, watch]}
- {apiGroups: [""], resources: [events], verbs: [list, create, patch]}
{{- end }}

{{/* Subject of the bindings of the controller's roles. */}}
{{- define "topwork.controller.subject" -}}
- {kind: ServiceAccount, name: {{ include "topwork.controller.name" . }}, namespace: {{ .Release.Namespace }}}
{{- end }}

{{/* Image of the controller. */}}
{{- define "topwork.controller.image" -}}
{{- .Values.controller.image | default (printf "topwork:%s-controller" .Chart.AppVersion) -}}
{{- end }}

{{/* Fields of every pod with the image of the controller: placement, credentials of the registry, Pod Security. */}}
{{- define "topwork.controller.pod" -}}
enableServiceLinks: false
{{- with .Values.controller.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ quote . }}
  {{- end }}
{{- end }}
{{- with .Values.controller.priorityClassName }}
priorityClassName: {{ quote . }}
{{- end }}
{{- with .Values.controller.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.controller.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "topwork.podSecurity" . | nindent 2 }}
{{- end }}

{{/* Metadata of the hooks. Arguments: root, part, hook, weight; clusterScoped. */}}
{{- define "topwork.hook.metadata" -}}
{{- if .clusterScoped -}}
name: {{ include "topwork.clusterName" . }}
{{- else -}}
name: {{ include "topwork.name" . }}
namespace: {{ .root.Release.Namespace }}
{{- end }}
labels:
  {{- include "topwork.labels" (dict "root" .root) | nindent 2 }}
annotations:
  helm.sh/hook: {{ .hook }}
  helm.sh/hook-weight: {{ .weight | default 0 | quote }}
  helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
