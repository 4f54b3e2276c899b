{{- define "daruma.labels" -}}
app.kubernetes.io/name: daruma-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
{{- define "daruma.selector" -}}
app.kubernetes.io/name: daruma-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
