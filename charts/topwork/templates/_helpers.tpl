{{/* Name of an object of the release. Arguments: root, part. */}}
{{- define "topwork.name" -}}
{{- $release := .root.Release.Name -}}
{{- if not (contains "topwork" $release) -}}{{- $release = printf "%s-topwork" $release -}}{{- end -}}
{{- printf "%s-%s" ($release | trunc 40 | trimSuffix "-") .part -}}
{{- end }}

{{/* Fixed names that jobs and the topwork commands rely on, independent of the release name. */}}
{{- define "topwork.name.secret" -}}topwork-s3{{- end }}
{{- define "topwork.name.account" -}}topwork-job{{- end }}
{{- define "topwork.name.defaults" -}}topwork-defaults{{- end }}
{{- define "topwork.name.submitter" -}}topwork-submitter{{- end }}

{{/* Labels of an object of the release. Arguments: root; name, if the application is not topwork. */}}
{{- define "topwork.labels" -}}
app.kubernetes.io/name: {{ .name | default "topwork" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: topwork
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Selector labels of the embedded S3 server. */}}
{{- define "topwork.seaweedfs.selector" -}}
app.kubernetes.io/name: seaweedfs
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Labels of the objects of a run. Arguments: run (output of topwork.run), role. */}}
{{- define "topwork.run.labels" -}}
{{- $labels := deepCopy .run.job.metadata.labels -}}
{{- range $key, $value := dict
  "app.kubernetes.io/name" "topwork"
  "app.kubernetes.io/instance" .run.name
  "app.kubernetes.io/version" .run.version
  "app.kubernetes.io/component" .role
  "app.kubernetes.io/part-of" "topwork"
  "app.kubernetes.io/managed-by" "topwork"
  "topwork.dev/job" .run.job.metadata.name
  "topwork.dev/run" .run.name -}}
  {{- $_ := set $labels $key $value -}}
{{- end -}}
{{- toYaml $labels -}}
{{- end }}

{{/* Labels of a pod of a run. */}}
{{- define "topwork.pod.labels" -}}
{{- $labels := include "topwork.run.labels" . | fromYaml -}}
{{- $_ := set $labels "topwork.dev/role" .role -}}
{{- toYaml $labels -}}
{{- end }}

{{/* Labels of a Job, including the queue name for Kueue. */}}
{{- define "topwork.job.labels" -}}
{{- $labels := include "topwork.pod.labels" . | fromYaml -}}
{{- with .run.job.spec.compute.queue -}}{{- $_ := set $labels "kueue.x-k8s.io/queue-name" . -}}{{- end -}}
{{- toYaml $labels -}}
{{- end }}
