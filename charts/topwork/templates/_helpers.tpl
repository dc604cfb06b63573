{{/* Name of an object of the release. Arguments: root, part. */}}
{{- define "topwork.name" -}}
{{- $release := .root.Release.Name -}}
{{- if not (contains "topwork" $release) -}}{{- $release = printf "%s-topwork" $release -}}{{- end -}}
{{- printf "%s-%s" ($release | trunc 40 | trimSuffix "-") .part -}}
{{- end }}

{{/* Name of a cluster-scoped object, which differs in each namespace. Arguments: root, part. */}}
{{- define "topwork.clusterName" -}}
{{- printf "%s.%s" (include "topwork.name" .) .root.Release.Namespace -}}
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
