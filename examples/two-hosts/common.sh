# 两个节点共用的设置；由 master.sh 与 worker.sh 读入。需要改的参数都在这里。

# 镜像：与原文档相同的标准环境（CUDA、PyTorch、eRDMA 驱动）。
IMAGE=${IMAGE:-egs-registry.cn-hangzhou.cr.aliyuncs.com/egs/vllm:0.7.2-sglang0.4.3.post2-pytorch2.5-cuda12.4-20250224}
# vLLM 版本：两个节点必须一致；rayless 需要 0.15 或更新的版本。
VLLM_VERSION=${VLLM_VERSION:-0.25.1}
# rayless 的 wheel，由 `make wheel` 生成，事先复制到两个节点的 /root 下。
RAYLESS_WHEEL=${RAYLESS_WHEEL:-$(ls /root/rayless-*.whl 2>/dev/null | tail -n 1)}
# 集群口令文件：master.sh 首次运行时生成；复制到 worker 节点的同一路径，权限 0600。
TOKEN_FILE=${TOKEN_FILE:-/root/rayless.token}
# VPC 网卡。
INTERFACE=${INTERFACE:-eth0}

die() {
    printf '%s\nhint: %s\n' "$1" "$2" >&2
    exit 1
}
[ -n "$RAYLESS_WHEEL" ] || die "/root 下没有 rayless 的 wheel" "在源码目录执行 make wheel，再把 dist/rayless-*.whl 复制到本机 /root"

# 与原文档相同的容器选项；"$1" 是容器内执行的脚本。
run_container() {
    docker run -t -d \
        --entrypoint /bin/bash \
        --name=vllm \
        --ipc=host \
        --cap-add=SYS_PTRACE \
        --network=host \
        --gpus all \
        --privileged \
        --ulimit memlock=-1 \
        --ulimit stack=67108864 \
        -v /root:/root \
        ${VLLM_API_KEY:+--env VLLM_API_KEY} \
        "$IMAGE" \
        -c "$1"
}

# 容器内的公共部分：安装，以及弹性 RDMA 所需的环境变量（与原文档相同）。
# GLOO/NCCL_SOCKET_IFNAME 可以不写：rayless 会按所选网卡为每个 worker 设置；手工设置的值优先。
SETUP="
set -e
pip install --upgrade vllm==$VLLM_VERSION $RAYLESS_WHEEL
export NCCL_IB_DISABLE=0
export NCCL_DEBUG=INFO
export NCCL_NET_GDR_LEVEL=5
export NCCL_P2P_LEVEL=5
export NCCL_IB_GID_INDEX=1
export GLOO_SOCKET_IFNAME=$INTERFACE
export NCCL_SOCKET_IFNAME=$INTERFACE
"
