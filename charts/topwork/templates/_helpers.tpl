{{/* Labels of the objects of a run. Takes: run (its facts, see topwork.run), role. */}}
{{- define "topwork.run.labels" -}}
{{- $labels := dict -}}
{{- range $key, $value := .run.job.metadata.labels -}}{{- $_ := set $labels $key $value -}}{{- end -}}
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

{{/* Labels of a pod of a run, and of the Job that makes it. */}}
{{- define "topwork.pod.labels" -}}
{{- $labels := include "topwork.run.labels" . | fromYaml -}}
{{- $_ := set $labels "topwork.dev/role" .role -}}
{{- toYaml $labels -}}
{{- end }}

{{/* Labels of a Job: with the queue's, which Kueue reads there. */}}
{{- define "topwork.job.labels" -}}
{{- $labels := include "topwork.pod.labels" . | fromYaml -}}
{{- with .run.job.spec.compute.queue -}}{{- $_ := set $labels "kueue.x-k8s.io/queue-name" . -}}{{- end -}}
{{- toYaml $labels -}}
{{- end }}
