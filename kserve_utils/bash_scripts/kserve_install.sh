#!/usr/bin/env bash
# A Kubernetes cluster on this machine (kind) with KServe on it, ready for the
# manifests in k8s_files/. Runs again without harm: what is there is left or upgraded.
#
# The versions are those that KServe v0.20.0 itself is released with.
set -euo pipefail

KIND_VERSION=v0.30.0
KUBECTL_VERSION=v1.34.0
HELM_VERSION=v3.16.3
NODE_IMAGE=kindest/node:v1.34.0 # KServe v0.20 asks for Kubernetes 1.32 or newer
CERT_MANAGER_VERSION=v1.17.0
GATEWAY_API_VERSION=v1.5.1
ENVOY_GATEWAY_VERSION=v1.8.1
KNATIVE_OPERATOR_VERSION=v1.21.1
KNATIVE_SERVING_VERSION=1.21.1
ISTIO_VERSION=1.27.1
KSERVE_VERSION=v0.20.0
KEDA_VERSION=2.18.0
PROMETHEUS_STACK_VERSION=83.4.0

mode=Standard
autoscaling=false
cluster=kserve
bin_dir=runs/bin
dry_run=false
cleanup=false

usage() {
  cat <<TEXT
Usage: $0 [options]
  --knative        Knative mode: Istio and Knative Serving, scales to zero.
                   The default is Standard mode: Gateway API and Envoy Gateway.
  --with-autoscaling
                   Prometheus and KEDA, by which xview-predictor.yaml scales on the
                   requests in flight. Knative mode has its own means.
  --cluster NAME   name of the kind cluster ($cluster)
  --bin-dir DIR    where missing tools go ($bin_dir)
  --dry-run        print each command, run none
  --cleanup        delete the kind cluster and end; tools stay
  -h, --help
Needs docker and curl. kind, kubectl and helm are downloaded if they are missing, and
checked against the SHA-256 that their projects publish.
TEXT
}

while (($#)); do
  case $1 in
    --knative) mode=Knative ;;
    --with-autoscaling) autoscaling=true ;;
    --cluster) cluster=${2:?--cluster needs a name} && shift ;;
    --bin-dir) bin_dir=${2:?--bin-dir needs a folder} && shift ;;
    --dry-run) dry_run=true ;;
    --cleanup) cleanup=true ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
  esac
  shift
done
if $autoscaling && [[ $mode == Knative ]]; then
  echo "--with-autoscaling is of Standard mode: Knative scales by itself" >&2
  exit 2
fi

say() { printf '\n== %s\n' "$*" >&2; }

# Every command that changes something goes through here.
run() {
  if $dry_run; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

# The same for a pipeline, in one line of shell.
shell() { if $dry_run; then printf '%s\n' "$*"; else eval "$*"; fi; }

# The same for a manifest on standard input.
apply() {
  if $dry_run; then
    echo "kubectl --context $context apply --server-side --filename - <<YAML"
    cat && echo YAML
  else
    kubectl --context "$context" apply --server-side --filename -
  fi
}

context=kind-$cluster
kube() { run kubectl --context "$context" "$@"; }
chart() {
  run helm upgrade --install "$@" --create-namespace --wait --timeout 10m \
    --kube-context "$context"
}

# download FILE SUFFIX URL: appears at FILE only if its checksum is that of URL.SUFFIX
download() {
  local file=$1 get="curl --fail --silent --show-error --location" part
  part=$(printf %q "$file.part")
  shell "$get --output $part $3"
  shell "echo \"\$($get $3.$2 | awk '{print \$1; exit}')  \"$part | sha256sum --check --quiet"
  run mv "$file.part" "$file"
}

# a dry run shows the downloads of all tools
missing() { $dry_run || ! command -v "$1" >/dev/null; }

install_tools() {
  say "tools: kind, kubectl, helm"
  local os arch
  os=$(uname -s | tr '[:upper:]' '[:lower:]')
  case $(uname -m) in
    x86_64 | amd64) arch=amd64 ;;
    aarch64 | arm64) arch=arm64 ;;
    *) echo "no downloads for the processor $(uname -m)" >&2 && exit 1 ;;
  esac
  run mkdir -p "$bin_dir"
  if missing kind; then
    download "$bin_dir/kind" sha256sum \
      "https://github.com/kubernetes-sigs/kind/releases/download/$KIND_VERSION/kind-$os-$arch"
    run chmod +x "$bin_dir/kind"
  fi
  if missing kubectl; then
    download "$bin_dir/kubectl" sha256 \
      "https://dl.k8s.io/release/$KUBECTL_VERSION/bin/$os/$arch/kubectl"
    run chmod +x "$bin_dir/kubectl"
  fi
  if missing helm; then
    local archive=helm-$HELM_VERSION-$os-$arch.tar.gz
    download "$bin_dir/$archive" sha256sum "https://get.helm.sh/$archive"
    run tar --extract --gzip --file "$bin_dir/$archive" --directory "$bin_dir" \
      --strip-components 1 "$os-$arch/helm"
  fi
}

create_cluster() {
  say "cluster: kind $cluster"
  if ! $dry_run && kind get clusters 2>/dev/null | grep -qx "$cluster"; then
    echo "kind cluster $cluster is there"
  else
    run kind create cluster --name "$cluster" --image "$NODE_IMAGE" --wait 5m
  fi
  kube wait --for condition=Ready node --all --timeout 5m
}

install_cert_manager() {
  say "cert-manager $CERT_MANAGER_VERSION: certificates of KServe's webhooks"
  chart cert-manager cert-manager --repo https://charts.jetstack.io \
    --version "$CERT_MANAGER_VERSION" --namespace cert-manager --set crds.enabled=true
}

install_gateway() {
  say "Gateway API $GATEWAY_API_VERSION and Envoy Gateway $ENVOY_GATEWAY_VERSION"
  kube apply --server-side --filename \
    "https://github.com/kubernetes-sigs/gateway-api/releases/download/$GATEWAY_API_VERSION/standard-install.yaml"
  kube wait --for condition=Established --timeout 2m \
    crd/gateways.gateway.networking.k8s.io crd/httproutes.gateway.networking.k8s.io
  # The chart brings experimental CRDs of the Gateway API too, which the standard ones
  # refuse to have beside them: only Envoy Gateway's own are taken.
  local chart=oci://docker.io/envoyproxy/gateway-helm
  local ours='/^---/ { if (ours) printf "%s", text; text = ""; ours = 0 }'
  # shellcheck disable=SC2016  # $0 is awk's
  ours+=' { text = text $0 "\n" } /^  group: gateway\.envoyproxy\.io *$/ { ours = 1 }'
  ours+=' END { if (ours) printf "%s", text }'
  shell "helm show crds $chart --version $ENVOY_GATEWAY_VERSION | awk '$ours' |" \
    "kubectl --context $(printf %q "$context") apply --server-side --force-conflicts --filename -"
  chart eg "$chart" --version "$ENVOY_GATEWAY_VERSION" --skip-crds \
    --namespace envoy-gateway-system
  # ClusterIP: kind has no load balancer, requests come in by port-forward
  apply <<'YAML'
apiVersion: v1
kind: Namespace
metadata:
  name: kserve
---
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: EnvoyProxy
metadata:
  name: cluster-ip
  namespace: envoy-gateway-system
spec:
  provider:
    type: Kubernetes
    kubernetes:
      envoyService:
        type: ClusterIP
---
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata:
  name: envoy
spec:
  controllerName: gateway.envoyproxy.io/gatewayclass-controller
  parametersRef:
    group: gateway.envoyproxy.io
    kind: EnvoyProxy
    name: cluster-ip
    namespace: envoy-gateway-system
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: kserve-ingress-gateway
  namespace: kserve
spec:
  gatewayClassName: envoy
  listeners:
    - name: http
      protocol: HTTP
      port: 80
      allowedRoutes:
        namespaces:
          from: All
  infrastructure:
    labels:
      serving.kserve.io/gateway: kserve-ingress-gateway
YAML
  kube wait --for condition=Programmed --namespace kserve \
    gateway/kserve-ingress-gateway --timeout 5m
}

install_knative() {
  say "Istio $ISTIO_VERSION and Knative Serving $KNATIVE_SERVING_VERSION"
  local repo=https://istio-release.storage.googleapis.com/charts
  chart istio-base base --repo "$repo" --version "$ISTIO_VERSION" \
    --namespace istio-system --set defaultRevision=default
  chart istiod istiod --repo "$repo" --version "$ISTIO_VERSION" \
    --namespace istio-system --set proxy.autoInject=disabled
  # kind has no load balancer: with the chart's default the service would wait forever
  chart istio-ingressgateway gateway --repo "$repo" --version "$ISTIO_VERSION" \
    --namespace istio-system --set service.type=NodePort
  chart knative-operator \
    "https://github.com/knative/operator/releases/download/knative-$KNATIVE_OPERATOR_VERSION/knative-operator-$KNATIVE_OPERATOR_VERSION.tgz" \
    --namespace knative-operator
  apply <<YAML
apiVersion: v1
kind: Namespace
metadata:
  name: knative-serving
---
apiVersion: operator.knative.dev/v1beta1
kind: KnativeServing
metadata:
  name: knative-serving
  namespace: knative-serving
spec:
  version: "$KNATIVE_SERVING_VERSION"
  config:
    domain:
      example.com: ""
    features:
      kubernetes.podspec-persistent-volume-claim: enabled
YAML
  kube wait --for condition=Ready --namespace knative-serving \
    knativeserving/knative-serving --timeout 10m
}

# Before KServe, which looks for KEDA's kinds when it starts.
install_autoscaling() {
  say "Prometheus (kube-prometheus-stack $PROMETHEUS_STACK_VERSION) and KEDA $KEDA_VERSION"
  chart prometheus kube-prometheus-stack \
    --repo https://prometheus-community.github.io/helm-charts \
    --version "$PROMETHEUS_STACK_VERSION" --namespace monitoring \
    --values "$(dirname "$0")/prometheus-values.yaml"
  kube wait --for condition=Available --namespace monitoring \
    prometheus/prometheus-kube-prometheus-prometheus --timeout 5m
  chart keda keda --repo https://kedacore.github.io/charts --version "$KEDA_VERSION" \
    --namespace keda
}

install_kserve() {
  say "KServe $KSERVE_VERSION, $mode mode"
  local charts=oci://ghcr.io/kserve/charts
  local settings=(--set "kserve.version=$KSERVE_VERSION"
    --set "kserve.controller.deploymentMode=$mode")
  if [[ $mode == Standard ]]; then
    local gateway=kserve.controller.gateway.ingressGateway
    settings+=(--set "$gateway.enableGatewayApi=true" --set "$gateway.className=envoy")
  fi
  chart kserve-crd "$charts/kserve-crd" --version "$KSERVE_VERSION" --namespace kserve
  chart kserve-resources "$charts/kserve-resources" --version "$KSERVE_VERSION" \
    --namespace kserve "${settings[@]}"
  kube wait --for condition=Available --namespace kserve \
    deployment/kserve-controller-manager --timeout 5m
}

case $bin_dir in
  /*) export PATH=$bin_dir:$PATH ;;
  *) export PATH=$PWD/$bin_dir:$PATH ;;
esac

if $cleanup; then
  say "deleting the kind cluster $cluster"
  run kind delete cluster --name "$cluster"
  exit 0
fi
if ! $dry_run && ! docker info >/dev/null 2>&1; then
  echo "docker does not answer: start it, or check that you may use it" >&2
  exit 1
fi
install_tools
create_cluster
install_cert_manager
if [[ $mode == Standard ]]; then install_gateway; else install_knative; fi
if $autoscaling; then install_autoscaling; fi
install_kserve
say "KServe is ready. Next: kubectl --context $context apply --filename k8s_files/pv-and-pvc.yaml"
