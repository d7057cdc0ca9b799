// Package deploy checks compose.yaml and deploy/kubernetes.yaml with the types of Compose and of
// Kubernetes: they have no unknown fields, and their parts fit together. It is a package of its own because
// these types take long to compile.
package deploy

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	policy "k8s.io/api/policy/v1"
	"sigs.k8s.io/yaml"
)

const root = "../.."

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// compose loads compose.yaml as docker compose does with these variables and profiles.
func compose(t *testing.T, variables []string, profiles ...string) *types.Project {
	t.Helper()
	options, err := cli.NewProjectOptions([]string{filepath.Join(root, "compose.yaml")},
		cli.WithEnv(variables), cli.WithProfiles(profiles))
	if err != nil {
		t.Fatal(err)
	}
	project, err := options.LoadProject(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return project
}

func TestCompose(t *testing.T) {
	want := []string{"clickhouse", "goods", "nats", "postgres", "redis"}
	if got := compose(t, nil).ServiceNames(); !slices.Equal(got, want) {
		t.Errorf("without a profile: got %v, want %v", got, want)
	}
	pinned := regexp.MustCompile(`:v?\d+\.\d+[^:]*$`)
	for name, service := range compose(t, nil, "monitoring").Services {
		if service.Build == nil && !pinned.MatchString(service.Image) {
			t.Errorf("%s: the image %s has no version", name, service.Image)
		}
		for _, port := range service.Ports {
			if port.HostIP != "127.0.0.1" {
				t.Errorf("%s: port %d is published on %q", name, port.Target, port.HostIP)
			}
		}
		for _, volume := range service.Volumes {
			if volume.Type != types.VolumeTypeBind {
				continue
			}
			if info, err := os.Stat(volume.Source); err != nil || !info.Mode().IsRegular() {
				t.Errorf("%s: %s is not a file: %v", name, volume.Source, err)
			}
		}
		if service.MemLimit == 0 {
			t.Errorf("%s has no limit of memory", name)
		}
	}
	goods := compose(t, nil).Services["goods"]
	mib, err := strconv.ParseInt(strings.TrimSuffix(*goods.Environment["GOMEMLIMIT"], "MiB"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	if share := float64(mib<<20) / float64(goods.MemLimit); share < 0.8 || share > 0.9 {
		t.Errorf("GOMEMLIMIT is %d MiB of %d bytes", mib, goods.MemLimit)
	}
}

// .env.example has every variable of compose.yaml, with the same default.
func TestEnvExample(t *testing.T) {
	defaults := map[string]string{}
	use := regexp.MustCompile(`\$\{(\w+):-([^}]*)\}`)
	for _, m := range use.FindAllStringSubmatch(string(readFile(t, "compose.yaml")), -1) {
		if value, ok := defaults[m[1]]; ok && value != m[2] {
			t.Errorf("%s has two defaults, %s and %s", m[1], value, m[2])
		}
		defaults[m[1]] = m[2]
	}
	example := map[string]string{}
	line := regexp.MustCompile(`(?m)^(\w+)=(.*)$`)
	for _, m := range line.FindAllStringSubmatch(string(readFile(t, ".env.example")), -1) {
		example[m[1]] = m[2]
	}
	if len(defaults) == 0 || !reflect.DeepEqual(example, defaults) {
		t.Errorf("got %v in .env.example, want those of compose.yaml, %v", example, defaults)
	}
}

func TestKubernetes(t *testing.T) {
	var deployment apps.Deployment
	var service core.Service
	var budget policy.PodDisruptionBudget
	documents := bytes.Split(readFile(t, "deploy/kubernetes.yaml"), []byte("\n---\n"))
	for i, into := range []any{&deployment, &service, &budget} {
		if err := yaml.UnmarshalStrict(documents[i], into); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range []string{"apps/v1 Deployment", "v1 Service", "policy/v1 PodDisruptionBudget"} {
		got := []string{
			deployment.APIVersion + " " + deployment.Kind,
			service.APIVersion + " " + service.Kind,
			budget.APIVersion + " " + budget.Kind,
		}[i]
		if got != want {
			t.Errorf("document %d: got %s, want %s", i+1, got, want)
		}
	}
	pod := deployment.Spec.Template
	for name, selector := range map[string]map[string]string{
		"Deployment":          deployment.Spec.Selector.MatchLabels,
		"Service":             service.Spec.Selector,
		"PodDisruptionBudget": budget.Spec.Selector.MatchLabels,
	} {
		if !reflect.DeepEqual(selector, pod.Labels) {
			t.Errorf("%s selects %v, the pods have %v", name, selector, pod.Labels)
		}
	}
	if budget.Spec.MinAvailable.IntVal >= *deployment.Spec.Replicas {
		t.Error("the budget lets no node be drained")
	}

	container := pod.Spec.Containers[0]
	port := container.Ports[0].Name
	if got := service.Spec.Ports[0].TargetPort.StrVal; got != port {
		t.Errorf("the Service targets port %q, want %q", got, port)
	}
	for path, probe := range map[string]*core.Probe{
		"/healthz": container.LivenessProbe,
		"/readyz":  container.ReadinessProbe,
	} {
		if probe.HTTPGet.Path != path || probe.HTTPGet.Port.StrVal != port {
			t.Errorf("got the probe %v, want %s on %s", probe.HTTPGet, path, port)
		}
	}
	// Postgres is waited for a minute before the service listens.
	if start := container.StartupProbe; start.PeriodSeconds*start.FailureThreshold < 70 {
		t.Errorf("the pod has %d times %d seconds to start", start.FailureThreshold, start.PeriodSeconds)
	}
	// From SIGTERM on the service takes up to 10.5 seconds.
	if grace := *pod.Spec.TerminationGracePeriodSeconds - container.Lifecycle.PreStop.Sleep.Seconds; grace < 12 {
		t.Errorf("the pod is killed %d seconds after SIGTERM", grace)
	}
	limit := container.Resources.Limits.Memory().Value()
	for _, variable := range container.Env {
		mib, _ := strconv.ParseInt(strings.TrimSuffix(variable.Value, "MiB"), 10, 64)
		if variable.Name == "GOMEMLIMIT" && (mib<<20 < limit*8/10 || mib<<20 > limit*95/100) {
			t.Errorf("GOMEMLIMIT is %s of %d bytes", variable.Value, limit)
		}
		if strings.HasSuffix(variable.Name, "_URL") && variable.ValueFrom.SecretKeyRef.Key != variable.Name {
			t.Errorf("%s is not from the secret's key of that name", variable.Name)
		}
	}
}

// What the image listens on is what compose.yaml publishes and the pods' probes ask; it does not run as root;
// and nothing kills it while it waits for Postgres or answers its last requests.
func TestImage(t *testing.T) {
	dockerfile := string(readFile(t, "Dockerfile"))
	setting := func(pattern string) string {
		t.Helper()
		m := regexp.MustCompile(`(?m)^` + pattern).FindStringSubmatch(dockerfile)
		if m == nil {
			t.Fatalf("the Dockerfile has no line %s", pattern)
		}
		return m[1]
	}
	seconds := func(pattern string) int {
		t.Helper()
		n, err := strconv.Atoi(setting(pattern))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	port := setting(`ENV HTTP_ADDR=:(\d+)$`) // of every address: the loopback's is out of reach from outside
	if exposed := setting(`EXPOSE (\d+)$`); exposed != port {
		t.Errorf("the image exposes port %s, want %s", exposed, port)
	}
	goods := compose(t, nil).Services["goods"]
	if target := fmt.Sprint(goods.Ports[0].Target); target != port {
		t.Errorf("compose.yaml publishes port %s, want %s", target, port)
	}
	var deployment apps.Deployment
	documents := bytes.Split(readFile(t, "deploy/kubernetes.yaml"), []byte("\n---\n"))
	if err := yaml.UnmarshalStrict(documents[0], &deployment); err != nil {
		t.Fatal(err)
	}
	pod := deployment.Spec.Template.Spec
	if of := fmt.Sprint(pod.Containers[0].Ports[0].ContainerPort); of != port {
		t.Errorf("the pods have port %s, want %s", of, port)
	}
	if user := setting(`USER (\d+):\d+$`); user == "0" || user != fmt.Sprint(*pod.SecurityContext.RunAsUser) {
		t.Errorf("the image runs as user %s, the pods as %d", user, *pod.SecurityContext.RunAsUser)
	}
	// Postgres is waited for a minute before the service listens.
	if start := seconds(`HEALTHCHECK .*--start-period=(\d+)s`); start < 65 {
		t.Errorf("the image may be called unhealthy %d seconds after its start", start)
	}
	// From SIGTERM on the service takes up to 10.5 seconds.
	if grace := time.Duration(*goods.StopGracePeriod); grace < 12*time.Second {
		t.Errorf("the service is killed %v after SIGTERM", grace)
	}
}
