#!/usr/bin/env bash
# worker 节点：加入集群并启动模型服务。对应原文档的 `ray start --address` 与 `vllm serve`。
# 与 master.sh 的先后顺序无关：head 还没有启动时，它会等待并说明在等什么。
#
# 用法：HEAD_NODE_ADDRESS=10.0.0.1 ModelName=deepseek-ai/DeepSeek-R1 MaxModelLen=16384 VLLM_API_KEY=… bash worker.sh
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"
. ./common.sh

: "${HEAD_NODE_ADDRESS:?填写 master 节点的内网 IP 地址}"
: "${ModelName:?填写模型名，例如 deepseek-ai/DeepSeek-R1；两个节点都要有 /root/llm-model/模型名}"
: "${MaxModelLen:=16384}"
: "${VLLM_API_KEY:?填写调用服务所需的密钥}"
# 流水线并行数，推荐设置为节点总数。
PipelineParallelSize=${PipelineParallelSize:-2}
[ -s "$TOKEN_FILE" ] || die "没有 $TOKEN_FILE" "从 master 节点复制：scp -p root@$HEAD_NODE_ADDRESS:$TOKEN_FILE $TOKEN_FILE"

# 密钥经由环境传入，不出现在容器的命令行里。除了多出的一个参数，vllm serve 的参数与原文档相同。
export VLLM_API_KEY
run_container "$SETUP
rayless join $HEAD_NODE_ADDRESS:6379 --bind $INTERFACE --token-file $TOKEN_FILE --daemon
exec vllm serve /root/llm-model/$ModelName \
    --served-model-name $ModelName \
    --gpu-memory-utilization 0.98 \
    --max-model-len $MaxModelLen \
    --enable-chunked-prefill \
    --host=0.0.0.0 \
    --port 8080 \
    --trust-remote-code \
    --api-key \"\$VLLM_API_KEY\" \
    --tensor-parallel-size \$(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l | awk '{print \$1}') \
    --pipeline-parallel-size $PipelineParallelSize \
    --distributed-executor-backend rayless"
