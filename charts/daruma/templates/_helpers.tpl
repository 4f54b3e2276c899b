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
{{- /* What the operator does where there are jobs. All of it is namespaced. */}}
{{- define "daruma.jobRules" -}}
- apiGroups: [daruma.dev]
  resources: [trainingjobs]
  verbs: [get, list, watch]
- apiGroups: [daruma.dev]
  resources: [trainingjobs/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, create, delete]
# Tokens of jobs are made, never read back: they follow from the operator's key.
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end }}
