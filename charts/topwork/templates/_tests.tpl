{{/* Pod spec of a test. Arguments: root; args of topwork; runs whose job specs are appended to args. */}}
{{- define "topwork.tests.pod" -}}
restartPolicy: Never
automountServiceAccountToken: false
enableServiceLinks: false
{{- $compute := (include "topwork.defaults" .root | fromJson).spec.compute | default dict }}
{{- with $compute.serviceAccountName }}
serviceAccountName: {{ quote . }}
{{- end }}
{{- with $compute.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ quote . }}
  {{- end }}
{{- end }}
securityContext:
  {{- include "topwork.podSecurity" . | nindent 2 }}
containers:
  - name: topwork
    image: {{ include "topwork.tests.image" .root | quote }}
    args:
      {{- range .args }}
      - {{ quote . }}
      {{- end }}
      {{- range .runs }}
      - /etc/topwork/{{ . }}.yaml
      {{- end }}
    env:
      - {name: HOME, value: /tmp}
    envFrom:
      - secretRef: {name: {{ include "topwork.name.secret" .root }}, optional: true}
    resources:
      requests: {cpu: 100m, memory: 256Mi}
      limits: {memory: 1Gi}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      {{- if .runs }}
      - {name: jobs, mountPath: /etc/topwork, readOnly: true}
      {{- end }}
    securityContext:
      {{- include "topwork.containerSecurity" . | nindent 6 }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: 1Gi}
  {{- with .runs }}
  - name: jobs
    projected:
      sources:
        {{- range . }}
        - configMap: {name: {{ . }}, items: [{key: job.yaml, path: {{ . }}.yaml}]}
        {{- end }}
  {{- end }}
{{- end }}
