{{/*
Defaults for jobs in the namespace, as JSON: image, and spec with storage, compute and metrics. `defaults` in the values
takes precedence over settings of other parts of the chart.
*/}}
{{- define "topwork.defaults" -}}
{{- $spec := deepCopy .Values.defaults.spec -}}
{{- if and .Values.seaweedfs.enabled (not $spec.storage) -}}
  {{- $_ := set $spec "storage" (printf "s3://%s" .Values.seaweedfs.bucket) -}}
{{- end -}}
{{- $compute := $spec.compute | default dict -}}
{{- if and (eq .Values.s3.credentials "workloadIdentity") (not $compute.serviceAccountName) -}}
  {{- $_ := set $spec "compute" (set $compute "serviceAccountName" (include "topwork.name.account" .)) -}}
{{- end -}}
{{- $metrics := $spec.metrics | default dict -}}
{{- if and .Values.monitoring.pushgateway (not $metrics.pushgateway) -}}
  {{- $_ := set $spec "metrics" (set $metrics "pushgateway" .Values.monitoring.pushgateway) -}}
{{- end -}}
{{- dict "image" .Values.defaults.image "spec" $spec | toJson -}}
{{- end }}

{{/* Whether the chart creates the Secret for object storage: "true" or empty. */}}
{{- define "topwork.makesSecret" -}}
{{- if and .Values.seaweedfs.enabled (ne .Values.s3.credentials "existing") -}}
  {{- fail (printf "s3.credentials is %s, but seaweedfs.enabled is true, and the embedded server has its own credentials. Set s3.credentials to existing, or seaweedfs.enabled to false." .Values.s3.credentials) -}}
{{- end -}}
{{- if or .Values.seaweedfs.enabled (eq .Values.s3.credentials "create") -}}
true
{{- else if and (eq .Values.s3.credentials "workloadIdentity") (or .Values.s3.endpoint .Values.s3.region) -}}
true
{{- end -}}
{{- end }}

{{/* Image of the pods that `helm test` runs. */}}
{{- define "topwork.tests.image" -}}
{{- .Values.tests.image | default .Values.defaults.image | default (printf "topwork:%s-cpu" .Chart.AppVersion) -}}
{{- end }}

{{/* Security contexts of pods and containers that meet the restricted Pod Security Standard. */}}
{{- define "topwork.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}
{{- define "topwork.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
