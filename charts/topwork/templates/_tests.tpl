{{/* Pod spec of the storage test. Arguments: root, storage. */}}
{{- define "topwork.tests.storage" -}}
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
    args: [storage, check, {{ quote .storage }}]
    env:
      - {name: HOME, value: /tmp}
    envFrom:
      - secretRef: {name: {{ include "topwork.name.secret" .root }}, optional: true}
    resources:
      requests: {cpu: 100m, memory: 256Mi}
      limits: {memory: 1Gi}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
    securityContext:
      {{- include "topwork.containerSecurity" . | nindent 6 }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: 1Gi}
{{- end }}
