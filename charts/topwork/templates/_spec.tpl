{{/*
Writes the job spec with defaults exactly as topwork does, so that runs have the same names.

files/spec.json, which is generated, describes the type and the default of each key.
*/}}

{{/*
A value of the spec. Arguments: value; shape, from files/spec.json; parts, all models in that file; style:
  digest   sorted JSON of the values that differ from their defaults, without keys that do not affect results; input of the digest in run names
  content  JSON without null values
  text     YAML on one line
*/}}
{{- define "topwork.spec.value" -}}
{{- $found := . -}}
{{- $value := .value -}}
{{- if kindIs "map" $value -}}
  {{- $part := "" -}}
  {{- range .shape.parts -}}
    {{- if or (not .key) (hasKey $value (default "" .key)) -}}{{- $part = $part | default .part -}}{{- end -}}
  {{- end -}}
  {{- if $part -}}
    {{- include "topwork.spec.part" (dict "value" $value "part" $part "parts" .parts "style" .style) -}}
  {{- else if eq .style "text" -}}
    {{- include "topwork.printable" (toRawJson $value) -}}
  {{- else -}}
    {{- toRawJson $value -}}
  {{- end -}}
{{- else if kindIs "slice" $value -}}
  {{- $items := list -}}
  {{- range $value -}}
    {{- $items = append $items (include "topwork.spec.value" (dict "value" . "shape" $found.shape.list "parts" $found.parts "style" $found.style)) -}}
  {{- end -}}
  {{- printf "[%s]" (join "," $items) -}}
{{- else if kindIs "bool" $value -}}
  {{- /* Helm parses YAML 1.1, in which on and off are booleans. */ -}}
  {{- if .shape.switch -}}{{- ternary "on" "off" $value | quote -}}{{- else -}}{{- $value -}}{{- end -}}
{{- else if typeIs "string" $value -}}
  {{- include "topwork.spec.string" . -}}
{{- else -}}
  {{- include "topwork.spec.number" . -}}
{{- end -}}
{{- end }}

{{/* A string. Quoted unless all YAML parsers read it as a string. */}}
{{- define "topwork.spec.string" -}}
{{- if ne .style "text" -}}
  {{- toRawJson .value -}}
{{- else if and (regexMatch "^[A-Za-z][A-Za-z0-9/._-]*$" .value) (not (regexMatch "^(?i:y|n|yes|no|on|off|true|false|null)$" .value)) -}}
  {{- .value -}}
{{- else -}}
  {{- quote .value -}}
{{- end -}}
{{- end }}

{{/* A number as Python writes it. Converted from text because Helm passes numbers as different types. */}}
{{- define "topwork.spec.number" -}}
{{- $number := float64 (toString .value) -}}
{{- $text := printf "%v" $number -}}
{{- if eq .shape.number "whole" -}}
  {{- printf "%.0f" $number -}}
{{- else if and (eq .shape.number "any") (eq $number (floor $number)) -}}
  {{- printf "%.0f" $number -}}
{{- else if regexMatch "e[+]" $text -}}
  {{- printf "%.1f" $number -}}
{{- else if not (regexMatch "[.e]" $text) -}}
  {{- printf "%s.0" $text -}}
{{- else if and (eq .style "text") (not (contains "." $text)) -}}
  {{- /* YAML 1.1 requires a decimal point in floats with an exponent. */ -}}
  {{- replace "e" ".0e" $text -}}
{{- else -}}
  {{- $text -}}
{{- end -}}
{{- end }}

{{/* A mapping of the spec on one line. Arguments: value, part, parts and style, see above. */}}
{{- define "topwork.spec.part" -}}
{{- $found := . -}}
{{- $items := list -}}
{{- /* range iterates over mappings in sorted order. */ -}}
{{- range $key, $shape := (get .parts .part).fields -}}
  {{- $value := get $found.value $key -}}
  {{- if not (hasKey $found.value $key) -}}{{- $value = $shape.default -}}{{- end -}}
  {{- if kindIs "invalid" $value -}}{{- $value = $shape.default -}}{{- end -}}
  {{- if and (not (kindIs "invalid" $value)) (not (and $shape.noResult (eq $found.style "digest"))) -}}
    {{- $text := include "topwork.spec.value" (dict "value" $value "shape" $shape "parts" $found.parts "style" $found.style) -}}
    {{- $default := "" -}}
    {{- if and (eq $found.style "digest") (not (kindIs "invalid" $shape.default)) -}}
      {{- $default = include "topwork.spec.value" (dict "value" $shape.default "shape" $shape "parts" $found.parts "style" "digest") -}}
    {{- end -}}
    {{- if ne $text $default -}}
      {{- $items = append $items (printf "%q:%s%s" $key (ternary " " "" (eq $found.style "text")) $text) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- printf "{%s}" (join "," $items) -}}
{{- end }}

{{/* A mapping of the spec as block YAML, with keys in the order of the reference. Arguments: value, part, parts. */}}
{{- define "topwork.spec.lines" -}}
{{- $found := . -}}
{{- $lines := list -}}
{{- range $key := (get .parts .part).order -}}
  {{- $shape := get (get $found.parts $found.part).fields $key -}}
  {{- $value := get $found.value $key -}}
  {{- if kindIs "map" $value -}}
    {{- $part := "" -}}
    {{- range $shape.parts -}}
      {{- if or (not .key) (hasKey $value (default "" .key)) -}}{{- $part = $part | default .part -}}{{- end -}}
    {{- end -}}
    {{- if $part -}}
      {{- $lines = append $lines (printf "%s:" $key) -}}
      {{- $lines = append $lines (include "topwork.spec.lines" (dict "value" $value "part" $part "parts" $found.parts) | indent 2) -}}
    {{- else -}}
      {{- $lines = append $lines (printf "%s: %s" $key (include "topwork.printable" (toRawJson $value))) -}}
    {{- end -}}
  {{- else if hasKey $found.value $key -}}
    {{- $text := include "topwork.spec.value" (dict "value" $value "shape" $shape "parts" $found.parts "style" "text") -}}
    {{- $lines = append $lines (printf "%s: %s" $key $text) -}}
  {{- end -}}
{{- end -}}
{{- join "\n" $lines -}}
{{- end }}

{{/* JSON in ASCII as Python writes it, with surrogate pairs for characters above U+FFFF. */}}
{{- define "topwork.ascii" -}}
{{- $text := . -}}
{{- range regexFindAll "[^ -~]" . -1 | uniq -}}
  {{- $escaped := printf "%+q" . | trimAll "\"" -}}
  {{- if hasPrefix "\\x" $escaped -}}
    {{- $escaped = printf "\\u00%s" (trimPrefix "\\x" $escaped) -}}
  {{- else if hasPrefix "\\U" $escaped -}}
    {{- $code := sub (int64 (printf "0x%s" (trimPrefix "\\U" $escaped))) 65536 -}}
    {{- $escaped = printf "\\u%04x\\u%04x" (add 55296 (div $code 1024)) (add 56320 (mod $code 1024)) -}}
  {{- end -}}
  {{- $text = replace . $escaped $text -}}
{{- end -}}
{{- $text -}}
{{- end }}

{{/* JSON with all characters escaped that YAML does not allow unescaped. */}}
{{- define "topwork.printable" -}}
{{- $text := . -}}
{{- range regexFindAll "[\\x7f-\\x{84}\\x{86}-\\x{9f}\\x{feff}\\x{fffe}\\x{ffff}]" . -1 | uniq -}}
  {{- $text = replace . (include "topwork.ascii" .) $text -}}
{{- end -}}
{{- $text -}}
{{- end }}

{{/*
A value as YAML. As JSON if toYaml returns nothing, as it does for control characters, or if a string is "=", which
toYaml does not quote and YAML 1.1 parsers such as PyYAML do not read as a string.
*/}}
{{- define "topwork.yaml" -}}
{{- $json := toRawJson . -}}
{{- $yaml := toYaml . -}}
{{- if or (not $yaml) (contains "\"=\"" $json) -}}
  {{- include "topwork.printable" $json -}}
{{- else -}}
  {{- $yaml -}}
{{- end -}}
{{- end }}
