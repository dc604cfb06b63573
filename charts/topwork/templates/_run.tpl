{{/*
The run of a job in .Values.jobs. Arguments: root, name. Returns JSON:
  name     name of the run, <name>-<8 hex digits>, as in `topwork render`
  job      complete job spec, including defaults
  content  the same job spec as JSON text, from which the digest of the Job is computed
  image    image of all containers
  version  version of topwork
*/}}
{{- define "topwork.run" -}}
{{- $shapes := .root.Files.Get "files/spec.json" | fromJson -}}
{{- $job := get .root.Values.jobs .name -}}
{{- $spec := deepCopy $job.spec -}}
{{- $defaults := include "topwork.defaults" .root | fromJson -}}
{{- range $part, $default := $defaults.spec -}}
  {{- if not (kindIs "map" $default) -}}
    {{- if not (get $spec $part) -}}{{- $_ := set $spec $part $default -}}{{- end -}}
  {{- else -}}
    {{- $own := get $spec $part | default dict -}}
    {{- range $key, $value := $default -}}
      {{- if not (hasKey $own $key) -}}{{- $_ := set $own $key $value -}}{{- end -}}
    {{- end -}}
    {{- $_ := set $spec $part $own -}}
  {{- end -}}
{{- end -}}
{{- if not $spec.storage -}}
  {{- fail (printf "jobs.%s.spec.storage is missing. Set it, for example to s3://bucket/prefix, or set defaults.spec.storage for all jobs." .name) -}}
{{- end -}}
{{- include "topwork.run.reach" (dict "name" .name "spec" $spec) -}}
{{- $metadata := dict "name" .name "labels" ($job.labels | default dict) -}}
{{- $document := dict "apiVersion" "topwork.dev/v1alpha1" "kind" "TransferJob" "metadata" $metadata "spec" $spec -}}
{{- $content := include "topwork.spec.part" (dict "value" $document "part" $shapes.root "parts" $shapes.parts "style" "content") -}}
{{- $named := include "topwork.spec.part" (dict "value" $spec "part" $shapes.spec "parts" $shapes.parts "style" "digest") -}}
{{- $digest := include "topwork.ascii" $named | sha256sum -}}
{{- $full := fromJson $content -}}
{{- $accelerator := ternary "gpu" "cpu" (gt (int $full.spec.compute.gpus) 0) -}}
{{- $version := .root.Chart.AppVersion -}}
{{- toJson (dict
  "name" (printf "%s-%s" .name (trunc 8 $digest))
  "job" $full
  "content" $content
  "image" ($defaults.image | default (printf "topwork:%s-%s" $version $accelerator))
  "version" $version) -}}
{{- end }}

{{/* Rejects local paths, which pods cannot read, as `topwork render` does. */}}
{{- define "topwork.run.reach" -}}
{{- $spec := .spec -}}
{{- $addresses := dict -}}
{{- range $kind := list "folder" "archive" "table" -}}
  {{- with get $spec.dataset.source $kind -}}{{- $_ := set $addresses (printf "dataset.source.%s.uri" $kind) .uri -}}{{- end -}}
{{- end -}}
{{- with $spec.model.base.saved -}}{{- $_ := set $addresses "model.base.saved.uri" .uri -}}{{- end -}}
{{- with $spec.model.base.weights -}}
  {{- if not (has . (list "imagenet" "none")) -}}{{- $_ := set $addresses "model.base.weights" . -}}{{- end -}}
{{- end -}}
{{- $name := .name -}}
{{- range $path, $address := $addresses -}}
  {{- if not (regexMatch "^[A-Za-z][A-Za-z0-9+.-]*:/" $address) -}}
    {{- fail (printf "jobs.%s.spec.%s: %q is a local path, which pods cannot read. Upload it to object storage and use its s3:// URI." $name $path $address) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* Content of job.yaml in the ConfigMap. Arguments: root, run. */}}
{{- define "topwork.run.text" -}}
{{- $shapes := .root.Files.Get "files/spec.json" | fromJson -}}
{{- include "topwork.spec.lines" (dict "value" .run.job "part" $shapes.root "parts" $shapes.parts) -}}
{{- end }}

{{/* A Job of a run without the digest annotation. Arguments: run, role (training or prefetch). */}}
{{- define "topwork.run.job" -}}
{{- $compute := .run.job.spec.compute -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ .run.name }}{{ ternary "-pull" "" (eq .role "prefetch") }}
  labels:
    {{- include "topwork.job.labels" . | nindent 4 }}
spec:
  completions: 1
  parallelism: 1
  backoffLimit: {{ int64 $compute.retries }}
  activeDeadlineSeconds: {{ int64 $compute.deadlineSeconds }}
  ttlSecondsAfterFinished: {{ int64 $compute.ttlSecondsAfterFinished }}
  # Two pods must never work on the same run: the next pod is created after the last one has ended.
  podReplacementPolicy: Failed
  podFailurePolicy:
    rules:
      - action: FailJob
        onExitCodes: {operator: In, values: [2, 3]}
      - action: Count
        onExitCodes: {operator: In, values: [75]}
      - action: Ignore
        onPodConditions: [{type: DisruptionTarget, status: "True"}]
      - action: Ignore
        onExitCodes: {operator: In, values: [143]}
  template:
    metadata:
      labels:
        {{- include "topwork.pod.labels" . | nindent 8 }}
      {{- with $compute.annotations }}
      annotations:
        {{- include "topwork.yaml" . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "topwork.run.pod" . | nindent 6 }}
{{- end }}

{{/* Pod spec of a Job. Arguments: run, role. */}}
{{- define "topwork.run.pod" -}}
{{- $compute := .run.job.spec.compute -}}
{{- $training := eq .role "training" -}}
restartPolicy: Never
terminationGracePeriodSeconds: {{ int64 $compute.terminationGracePeriodSeconds }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $compute.serviceAccountName }}
serviceAccountName: {{ quote . }}
{{- end }}
{{- with $compute.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ quote . }}
  {{- end }}
{{- end }}
{{- with $compute.priorityClassName }}
priorityClassName: {{ quote . }}
{{- end }}
{{- with $compute.tolerations }}
tolerations:
  {{- include "topwork.yaml" . | nindent 2 }}
{{- end }}
{{- if and $training $compute.nodeSelector }}
nodeSelector:
  {{- toYaml $compute.nodeSelector | nindent 2 }}
{{- end }}
{{- if and $training $compute.affinity }}
affinity:
  {{- include "topwork.yaml" $compute.affinity | nindent 2 }}
{{- end }}
securityContext:
  {{- include "topwork.podSecurity" . | nindent 2 }}
{{- if $training }}
initContainers:
  {{- include "topwork.run.container" (dict "run" .run "role" .role "stage" "pull" "port" 9101) | nindent 2 }}
  {{- include "topwork.run.container" (dict "run" .run "role" .role "stage" "transfer" "port" 9102) | nindent 2 }}
containers:
  {{- include "topwork.run.container" (dict "run" .run "role" .role "stage" "fine-tune" "port" 9103) | nindent 2 }}
{{- else }}
containers:
  {{- include "topwork.run.container" (dict "run" .run "role" .role "stage" "pull" "port" 9101) | nindent 2 }}
{{- end }}
volumes:
  - name: job
    configMap: {name: {{ .run.name }}}
  - name: scratch
    emptyDir: {sizeLimit: {{ $compute.scratch }}}
  - name: home
    emptyDir: {sizeLimit: 1Gi}
  - name: tmp
    emptyDir: {sizeLimit: 4Gi}
  {{- if $training }}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ $compute.sharedMemory }}}
  {{- end }}
  {{- with $compute.extraCA }}
  # Optional: if it is missing, the process exits with code 2 and a clear message, and the pod does not wait with its GPUs.
  - name: ca
    configMap: {name: {{ quote .configMap }}, optional: true}
  {{- end }}
{{- end }}

{{/* Container of a stage, as a list item. Arguments: run, role, stage, port. */}}
{{- define "topwork.run.container" -}}
{{- $compute := .run.job.spec.compute -}}
- name: {{ .stage }}
  image: {{ quote .run.image }}
  args: [stage, {{ .stage }}, --job, /etc/topwork/job.yaml]
  env:
    - {name: HOME, value: /home/topwork}
    - {name: TMPDIR, value: /tmp}
    - {name: KERAS_HOME, value: /scratch/keras}
    - {name: TFDS_DATA_DIR, value: /scratch/tfds}
    - {name: TOPWORK_GRACE_SECONDS, value: {{ int64 $compute.terminationGracePeriodSeconds | quote }}}
    - {name: TOPWORK_RUN, valueFrom: {fieldRef: {fieldPath: "metadata.labels['topwork.dev/run']"}}}
    - {name: TOPWORK_ATTEMPT, valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/controller-uid']"}}}
    - {name: TOPWORK_DATASET, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['topwork.dev/dataset']"}}}
    - {name: TOPWORK_RESTART, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['topwork.dev/restart']"}}}
    # TensorFlow counts the cores of the node, not of the container.
    - {name: TF_NUM_INTRAOP_THREADS, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}
    {{- with $compute.extraCA }}
    - {name: TOPWORK_EXTRA_CA, value: {{ printf "/etc/topwork-ca/%s" .key | quote }}}
    {{- end }}
  # Optional: if it is missing, the pod starts, and the process exits with code 2 and a clear message.
  envFrom:
    - secretRef: {name: topwork-s3, optional: true}
  ports:
    - {name: http-{{ .stage }}, containerPort: {{ .port }}}
  resources:
    requests:
      {{- include "topwork.run.amounts" . | nindent 6 }}
    limits:
      {{- include "topwork.run.amounts" . | nindent 6 }}
  volumeMounts:
    - {name: job, mountPath: /etc/topwork, readOnly: true}
    - {name: scratch, mountPath: /scratch}
    - {name: home, mountPath: /home/topwork}
    - {name: tmp, mountPath: /tmp}
    {{- if ne .stage "pull" }}
    - {name: shm, mountPath: /dev/shm}
    {{- end }}
    {{- if $compute.extraCA }}
    - {name: ca, mountPath: /etc/topwork-ca, readOnly: true}
    {{- end }}
  securityContext:
    {{- include "topwork.containerSecurity" . | nindent 4 }}
  terminationMessagePolicy: FallbackToLogsOnError
{{- end }}

{{/*
Resource requests and limits of a container. A prefetch pod gets at most 4 CPUs and 8Gi of memory. Arguments: run, role,
stage.
*/}}
{{- define "topwork.run.amounts" -}}
{{- $compute := .run.job.spec.compute -}}
{{- $millicores := include "topwork.millicores" $compute.cpu | int64 -}}
{{- $memory := $compute.memory -}}
{{- if eq .role "prefetch" -}}
  {{- $millicores = min $millicores 4000 -}}
  {{- if gt (include "topwork.bytes" $memory | float64) (include "topwork.bytes" "8Gi" | float64) -}}{{- $memory = "8Gi" -}}{{- end -}}
{{- end -}}
cpu: {{ if mod $millicores 1000 }}{{ $millicores }}m{{ else }}{{ div $millicores 1000 }}{{ end }}
memory: {{ $memory }}
ephemeral-storage: {{ include "topwork.disk" $compute.scratch }}
{{- if and (ne .stage "pull") (gt (int $compute.gpus) 0) }}
nvidia.com/gpu: {{ int $compute.gpus }}
{{- end }}
{{- end }}

{{/* Millicores, at least one. Argument: spec.compute.cpu. */}}
{{- define "topwork.millicores" -}}
{{- $cpu := toString . -}}
{{- if hasSuffix "m" $cpu -}}
  {{- trimSuffix "m" $cpu -}}
{{- else -}}
  {{- printf "%.0f" (ceil (round (mulf (float64 $cpu) 1000) 6)) -}}
{{- end -}}
{{- end }}

{{/* Disk space of a pod: scratch, /tmp (4Gi), home (1Gi) and logs (1Gi). Argument: spec.compute.scratch. */}}
{{- define "topwork.disk" -}}
{{- $mebibytes := ceil (divf (addf (include "topwork.bytes" . | float64) 6442450944.0) 1048576.0) -}}
{{- $gibibytes := divf $mebibytes 1024.0 -}}
{{- if eq $gibibytes (floor $gibibytes) -}}
  {{- printf "%.0fGi" $gibibytes -}}
{{- else -}}
  {{- printf "%.0fMi" $mebibytes -}}
{{- end -}}
{{- end }}

{{/* Bytes of a quantity with a unit, such as 16Gi. */}}
{{- define "topwork.bytes" -}}
{{- $number := regexFind "^[0-9.]+" . -}}
{{- $powers := dict "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- printf "%.3f" (mulf (float64 $number) (get $powers (trimPrefix $number .))) -}}
{{- end }}

{{/* A Job of a run with its digest annotation, as in `topwork render`. Arguments: root, run, role. */}}
{{- define "topwork.run.manifest" -}}
{{- $job := include "topwork.run.job" . | fromYaml -}}
{{- $digest := printf "[%s,%s]" (toRawJson $job) .run.content | include "topwork.ascii" | sha256sum -}}
{{- $_ := set $job.metadata "namespace" .root.Release.Namespace -}}
{{- $_ := set $job.metadata "annotations" (dict "topwork.dev/digest" $digest) -}}
{{- include "topwork.yaml" $job -}}
{{- end }}

{{/*
The Job in the cluster if it has the same name but other settings (compute, image, version of topwork), otherwise empty.
The spec of a Job is immutable: rendering the existing Job lets an upgrade succeed without changing it. Arguments: root, job (manifest).
*/}}
{{- define "topwork.run.kept" -}}
{{- $there := lookup "batch/v1" "Job" .job.metadata.namespace .job.metadata.name -}}
{{- if $there -}}
  {{- $signed := dict "topwork.dev/digest" (dig "annotations" "topwork.dev/digest" "" $there.metadata) -}}
  {{- if ne (toJson $signed) (toJson .job.metadata.annotations) -}}
    {{- $metadata := dict "name" $there.metadata.name "namespace" $there.metadata.namespace "labels" $there.metadata.labels "annotations" $signed -}}
    {{- dict "apiVersion" "batch/v1" "kind" "Job" "metadata" $metadata "spec" $there.spec | include "topwork.yaml" -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* The Job to apply: the existing Job if its settings differ, otherwise the new one. Arguments: root, run, role. */}}
{{- define "topwork.run.applied" -}}
{{- $manifest := include "topwork.run.manifest" . -}}
{{- include "topwork.run.kept" (dict "root" .root "job" (fromYaml $manifest)) | default $manifest -}}
{{- end }}
