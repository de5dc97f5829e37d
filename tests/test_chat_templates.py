"""What counts of a conversation under the templates of published models: each answer with its end marker, no more."""

import pytest
from test_tokens import CHAT, FORGETFUL, backend, turns
from transformers import PreTrainedTokenizerFast

from stride_ray.corpus.tokenization.template import ChatTemplate

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if m.tool_calls %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    """{{ '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}"""
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot_id|>' }}{% else %}"
    "{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim %}"
    "{% set content = content + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
PHI4 = PHI.replace("|>\n'", "|>'")
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- elif m.role == 'assistant' %}"
    "{{- '<|im_start|>' + m.role }}{%- if m.content %}{{- '\n' + m.content }}{%- endif %}"
    "{%- for c in m.tool_calls %}{%- if c.function %}{%- set c = c.function %}{%- endif %}"
    """{{- '\n<tool_call>\n{"name": "' }}{{- c.name }}{{- '", "arguments": ' }}{{- c.arguments | tojson }}"""
    "{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- elif m.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- else %}"
    "{%- set content = m.content %}{%- set thoughts = '' %}{%- if m.reasoning_content is string %}"
    "{%- set thoughts = m.reasoning_content %}{%- elif '</think>' in content %}"
    "{%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{- '<|im_start|>' + m.role + '\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
QWEN3_THINKING = QWEN3.partition("{%- if enable_thinking")[0].replace(
    "add_generation_prompt %}{{- '<|im_start|>assistant\n' }}",
    "add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}",
)
MISTRAL = (
    "{%- set ns = namespace(last=-1, index=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- if m.role == 'user' or (m.role == 'assistant' and "
    "m.tool_calls is not defined) %}{%- if (m.role == 'user') != (ns.index % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{%- endif %}{%- set ns.index = ns.index + 1 %}{%- endif %}"
    "{%- endfor %}{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- if tools is not none and loop.index0 == ns.last %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + "
    "'[/AVAILABLE_TOOLS]' }}{%- endif %}{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls is defined %}{{- '[TOOL_CALLS] [' }}{%- for c in m.tool_calls %}"
    """{{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' }}{{- ', ' if not loop.last else ']' + eos_token }}"""
    "{%- endfor %}{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' + m.content + '}[/TOOL_RESULTS]' }}{%- endif %}"
    "{%- endfor %}"
)
R1 = (
    "{% set ns = namespace(tool=false) %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.tool = false %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' and not m.content %}"
    "{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' + m.tool_calls[0].function.name + '\n```json\n' }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '\n```<｜tool▁calls▁end｜>' + eos_token }}"
    "{% elif m.role == 'assistant' %}{% if ns.tool %}{{ '<｜tool▁outputs▁end｜>' + m.content + eos_token }}"
    "{% set ns.tool = false %}{% else %}{% set content = m.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + content + eos_token }}"
    "{% endif %}"
    "{% else %}{% set ns.tool = true %}{{ '<｜tool▁outputs▁begin｜>' + m.content }}{% endif %}{% endfor %}"
    "{% if ns.tool %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}"
    "{% if add_generation_prompt and not ns.tool %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
OSS = (
    "<|start|>system<|message|>Hi.<|end|>{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>"
    "{{ m.content }}<|end|>{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CLOSED_R1 = R1.replace("{% if add", "{{ eos_token }}{% if add")
ALPACA = (
    "{% for m in messages %}{{ '### Instruction:\n' if m.role == 'user' else '### Response:\n' }}"
    "{{ m.content + '\n\n' }}{% endfor %}{{ eos_token }}"
)
NAMED = CHATML.replace(
    "m['role'] + '\n'", "m['role'] + (' name=' + m.name if m.name else '') + '\n' + (m.reasoning_content or '')"
)
CLOSED = CHAT.replace("{% if add", "{{ eos_token }}{% if add")
CLOSED_AFTER = CHAT + "{{ eos_token }}"
UNPROMPTED = CHATML.partition("{% if add")[0]


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=backend(), bos_token="<s>", eos_token="</s>")


def shown(tokenizer, template, messages, **arguments):
    """The conversation as text, with what counts between ⟦ and ⟧."""
    tokenizer.chat_template = template
    text, ranges = ChatTemplate(tokenizer).render(messages, arguments)
    for start, end in reversed(ranges):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


ASKED = turns("2+2?", "It is 4.", "Sure?", "Yes: 4.")
# Of each template, a conversation of one answer and of two.
EXPECTED = {
    "ChatML": (
        CHATML,
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n",
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Yes: 4.<|im_end|>⟧\n",
    ),
    "Zephyr": (
        ZEPHYR,
        "<|user|>\n2+2?</s>\n<|assistant|>\n⟦It is 4.</s>⟧\n",
        "<|user|>\n2+2?</s>\n<|assistant|>\n⟦It is 4.</s>⟧\n<|user|>\nSure?</s>\n<|assistant|>\n⟦Yes: 4.</s>⟧\n",
    ),
    "Llama 2": (
        LLAMA2,
        "<s>[INST] 2+2? [/INST]⟦ It is 4. </s>⟧",
        "<s>[INST] 2+2? [/INST]⟦ It is 4. </s>⟧<s>[INST] Sure? [/INST]⟦ Yes: 4. </s>⟧",
    ),
    "Llama 3": (
        LLAMA3,
        "<s><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 4.<|eot_id|>⟧",
        "<s><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 4.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes: 4.<|eot_id|>⟧",
    ),
    "Phi 3": (
        PHI,
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n⟦It is 4.<|end|>⟧\n<|endoftext|>",
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n⟦It is 4.<|end|>⟧\n"
        "<|user|>\nSure?<|end|>\n<|assistant|>\n⟦Yes: 4.<|end|>⟧\n<|endoftext|>",
    ),
    "Phi 4 mini": (
        PHI4,
        "<|user|>2+2?<|end|><|assistant|>⟦It is 4.<|end|>⟧<|endoftext|>",
        "<|user|>2+2?<|end|><|assistant|>⟦It is 4.<|end|>⟧"
        "<|user|>Sure?<|end|><|assistant|>⟦Yes: 4.<|end|>⟧<|endoftext|>",
    ),
    "Gemma": (
        GEMMA,
        "<s><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n⟦It is 4.<end_of_turn>⟧\n",
        "<s><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n⟦It is 4.<end_of_turn>⟧\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n⟦Yes: 4.<end_of_turn>⟧\n",
    ),
    "Qwen 2.5": (
        QWEN25,
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n",
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes: 4.<|im_end|>⟧\n",
    ),
    "Qwen 3": (
        QWEN3,
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt is 4.<|im_end|>⟧\n",
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nYes: 4.<|im_end|>⟧\n",
    ),
    "Qwen 3 Thinking": (
        QWEN3_THINKING,
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n⟦\n</think>\n\nIt is 4.<|im_end|>⟧\n",
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n<think>\n⟦\n</think>\n\nYes: 4.<|im_end|>⟧\n",
    ),
    "Mistral v3": (
        MISTRAL,
        "<s>[INST] 2+2?[/INST]⟦ It is 4.</s>⟧",
        "<s>[INST] 2+2?[/INST]⟦ It is 4.</s>⟧[INST] Sure?[/INST]⟦ Yes: 4.</s>⟧",
    ),
    "DeepSeek R1 distill": (
        R1,
        "<s><｜User｜>2+2?<｜Assistant｜>⟦It is 4.</s>⟧",
        "<s><｜User｜>2+2?<｜Assistant｜>⟦It is 4.</s>⟧<｜User｜>Sure?<｜Assistant｜>⟦Yes: 4.</s>⟧",
    ),
    "end of text closes": (
        CLOSED,
        "<|start|>user\n2+2?<|end|>\n<|start|>assistant\n⟦It is 4.<|end|>⟧\n</s>",
        "<|start|>user\n2+2?<|end|>\n<|start|>assistant\n⟦It is 4.<|end|>⟧\n"
        "<|start|>user\nSure?<|end|>\n<|start|>assistant\n⟦Yes: 4.<|end|>⟧\n</s>",
    ),
    "gpt-oss": (
        OSS,
        "<|start|>system<|message|>Hi.<|end|><|start|>user<|message|>2+2?<|end|><|start|>assistant"
        "⟦<|channel|>final<|message|>It is 4.<|return|>⟧",
        "<|start|>system<|message|>Hi.<|end|><|start|>user<|message|>2+2?<|end|><|start|>assistant"
        "⟦<|channel|>final<|message|>It is 4.<|end|>⟧<|start|>user<|message|>Sure?<|end|><|start|>assistant"
        "⟦<|channel|>final<|message|>Yes: 4.<|return|>⟧",
    ),
    "GLM 4": (
        GLM,
        "[gMASK]<sop><|user|>\n2+2?<|assistant|>⟦\nIt is 4.⟧",
        "[gMASK]<sop><|user|>\n2+2?<|assistant|>⟦\nIt is 4.⟧<|user|>\nSure?<|assistant|>⟦\nYes: 4.⟧",
    ),
    "Alpaca": (
        ALPACA,
        "### Instruction:\n2+2?\n\n### Response:\n⟦It is 4.\n\n</s>⟧",
        "### Instruction:\n2+2?\n\n### Response:\n⟦It is 4.\n\n⟧### Instruction:\nSure?\n\n### Response:\n"
        "⟦Yes: 4.\n\n</s>⟧",
    ),
    "no prompt": (
        UNPROMPTED,
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n",
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Yes: 4.<|im_end|>⟧\n",
    ),
}
EXPECTED["end of text closes, after the prompt"] = (CLOSED_AFTER, *EXPECTED["end of text closes"][1:])
EXPECTED["end of text closes DeepSeek R1"] = (
    CLOSED_R1,
    *(f"{each}</s>" for each in EXPECTED["DeepSeek R1 distill"][1:]),
)
EXPECTED["Phi 3 with a system's turn"] = (
    "<|system|>\nHi.<|end|>\n" + PHI,
    *(f"<|system|>\nHi.<|end|>\n{each}" for each in EXPECTED["Phi 3"][1:]),
)
EXPECTED["Chat with names and thoughts"] = (NAMED, *EXPECTED["ChatML"][1:])


@pytest.mark.parametrize(("template", "one", "two"), EXPECTED.values(), ids=EXPECTED)
def test_published_templates(tokenizer, template, one, two):
    for messages, expected in ((ASKED[:2], one), (ASKED, two)):
        assert shown(tokenizer, template, messages, tools=None) == expected
        again = [*messages[:-1], {**messages[-1], "content": [{"type": "text", "text": messages[-1]["content"]}]}]
        assert shown(tokenizer, template, again, tools=None) == expected


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLED = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "abcdefghi"},
    *turns("It is 4.", "Sure?", "Yes: 4.", first="assistant"),
]
COUNTED = {
    "Llama 3": (LLAMA3, '{"name": "add", "parameters": {"a": 2}}<|eot_id|>', "It is 4.<|eot_id|>"),
    "Qwen 2.5": (
        QWEN25,
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
        "It is 4.<|im_end|>",
    ),
    "Mistral v3": (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}, "id": "abcdefghi"}]</s>',
        " It is 4.</s>",
    ),
    "DeepSeek R1 distill": (
        R1,
        '<｜tool▁calls▁begin｜>add\n```json\n{"a": 2}\n```<｜tool▁calls▁end｜></s>',
        "It is 4.</s>",
    ),
}


# As gpt-oss's: a result repeats the name of its call, and a content beside thoughts and a call is an error.
OSS_CALLS = (
    "{% set ns = namespace(name=none) %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if ns.name is none %}{{ raise_exception('a result without its call') }}{% endif %}"
    "{{ '<|start|>functions.' + ns.name + ' to=assistant<|channel|>commentary<|message|>' }}"
    "{{ m.content | tojson }}<|end|>"
    "{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% elif m.tool_calls %}{% if m.content and m.thinking %}{{ raise_exception('both') }}{% endif %}"
    "{% if m.content or m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' }}"
    "{{ m.content or m.thinking }}<|end|>{% endif %}{% set ns.name = m.tool_calls[0].function.name %}"
    "{{ '<|start|>assistant to=functions.' + ns.name + '<|channel|>commentary json<|message|>' }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# As Gemma 4's: results stand within the turn that called, before its content.
GEMMA_CALLS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|turn>user\n' + m.content + '<turn|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|turn>model\n' }}{% set ns = namespace(open=true) %}"
    "{% for c in m.tool_calls or [] %}{{ '<|tool_call>call:' + c.function.name + '<tool_call|>' }}{% endfor %}"
    "{% for r in messages[loop.index:] if m.tool_calls %}{% if r.role != 'tool' %}{% set ns.open = false %}{% endif %}"
    "{% if ns.open %}{{ '<|tool_response>response:' + r.content + '<tool_response|>' }}{% endif %}{% endfor %}"
    "{{ (m.content or '') + '<turn|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)
THOUGHTFUL = {"role": "assistant", "thinking": "Use it.", "tool_calls": [CALL]}
RESULTS = {
    "gpt-oss": (
        OSS_CALLS,
        CALLED,
        [
            ' to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>',
            "<|channel|>final<|message|>It is 4.<|end|>",
            "<|channel|>final<|message|>Yes: 4.<|return|>",
        ],
    ),
    "gpt-oss, a call at the end": (
        OSS_CALLS,
        CALLED[:2],
        [' to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>'],
    ),
    "gpt-oss, thoughts before a call": (
        OSS_CALLS,
        [CALLED[0], THOUGHTFUL, *CALLED[2:4]],
        [
            "<|channel|>analysis<|message|>Use it.<|end|>"
            '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>',
            "<|channel|>final<|message|>It is 4.<|return|>",
        ],
    ),
    "gpt-oss, two results": (
        OSS_CALLS,
        [*CALLED[:3], {**CALLED[2], "content": "<b>5</b>"}, CALLED[3]],
        [
            ' to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>',
            "<|channel|>final<|message|>It is 4.<|return|>",
        ],
    ),
    "Gemma 4": (
        GEMMA_CALLS,
        [CALLED[0], {**CALLED[1], "content": "I add."}, CALLED[2], {**CALLED[2], "content": "5"}, *CALLED[4:]],
        ["<|tool_call>call:add<tool_call|>", "I add.<turn|>", "Yes: 4.<turn|>"],
    ),
}


@pytest.mark.parametrize(("template", "messages", "expected"), RESULTS.values(), ids=RESULTS)
def test_results_of_calls_do_not_count(tokenizer, template, messages, expected):
    found = shown(tokenizer, template, messages)
    assert [part.partition("⟧")[0] for part in found.split("⟦")[1:]] == expected
    assert found.replace("⟦", "").replace("⟧", "") == ChatTemplate(tokenizer).render(messages)[0]
    answers = sum(message["role"] == "assistant" for message in messages)
    text, ranges = ChatTemplate(tokenizer).render(messages, learned=[True] + [False] * (answers - 1))
    assert [text[start:end] for start, end in ranges] == expected[: 2 if template == GEMMA_CALLS else 1]


@pytest.mark.parametrize(("template", "call", "answer"), COUNTED.values(), ids=COUNTED)
def test_calls_of_tools(tokenizer, template, call, answer):
    tools = [{"type": "function", "function": {"name": "add"}}]
    last = answer.replace("It is", "Yes:")
    for messages, expected in ((CALLED[:4], [call, answer]), (CALLED, [call, answer, last])):
        found = shown(tokenizer, template, messages, tools=tools)
        assert [part.partition("⟧")[0] for part in found.split("⟦")[1:]] == expected
    several = [{**CALLED[1], "tool_calls": [CALL, CALL]}]
    if template in (QWEN25, MISTRAL):
        found = shown(tokenizer, template, [CALLED[0], *several, *CALLED[2:]], tools=tools)
        assert found.partition("⟦")[2].partition("⟧")[0].count("add") == 2


def test_tools_before_the_last_question(tokenizer):
    found = shown(tokenizer, MISTRAL, ASKED, tools=[{"name": "add"}])
    assert found == (
        '<s>[INST] 2+2?[/INST]⟦ It is 4.</s>⟧[AVAILABLE_TOOLS] [{"name": "add"}][/AVAILABLE_TOOLS]'
        "[INST] Sure?[/INST]⟦ Yes: 4.</s>⟧"
    )


def test_thoughts_and_names(tokenizer):
    thought = turns("2+2?", "<think>\nEasy.\n</think>\n\nIt is 4.", "Sure?", "<think>\nYes.\n</think>\n\nYes: 4.")
    assert shown(tokenizer, QWEN3, thought) == EXPECTED["Qwen 3"][2].replace("<think>\n\n", "<think>\nYes.\n")
    assert (
        shown(tokenizer, R1, turns("2+2?", "<think>Easy.</think>It is 4.", "Sure?", "Yes: 4."))
        == (EXPECTED["DeepSeek R1 distill"][2])
    )
    named = [ASKED[0], {**ASKED[1], "name": "bob", "reasoning_content": "Easy. "}, *ASKED[2:]]
    assert shown(tokenizer, NAMED, named) == EXPECTED["ChatML"][2].replace(
        "assistant\n⟦It", "assistant name=bob\n⟦Easy. It"
    )
    assert shown(tokenizer, QWEN3, named[:2]) == EXPECTED["Qwen 3"][1].replace("<think>\n\n", "<think>\nEasy. \n")


def test_thoughts_after_a_prompt_with_empty_ones(tokenizer):
    """As Qwen 3.5's without thinking."""
    empty = "'<think>\n\n</think>\n\n'"
    template = CHATML.replace(
        "+ m['content']",
        "+ ('<think>\n' + m.thinking + '\n</think>\n\n' if m.thinking else "
        f"{empty} if m.role == 'assistant' else '') + m['content']",
    ).replace("'<|im_start|>assistant\n'", f"'<|im_start|>assistant\n' + {empty}")
    plain = shown(tokenizer, template, ASKED[:2])
    assert plain.endswith("assistant\n<think>\n\n</think>\n\n⟦It is 4.<|im_end|>⟧\n")
    found = shown(tokenizer, template, [ASKED[0], {**ASKED[1], "thinking": "Easy."}, *ASKED[2:]])
    assert "assistant\n<think>\n⟦Easy.\n</think>\n\nIt is 4.<|im_end|>⟧\n" in found
    assert found.endswith("<think>\n\n</think>\n\n⟦Yes: 4.<|im_end|>⟧\n")


def test_arguments_of_the_template(tokenizer):
    found = shown(tokenizer, QWEN3, ASKED, enable_thinking=False)
    assert found == EXPECTED["Qwen 3"][2].replace("⟦<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n⟦")


def test_the_beginning_of_text_does_not_count(tokenizer):
    first = turns("Hi.", "2+2?", "It is 4.", first="assistant")
    header = "{{ bos_token }}" + UNPROMPTED
    assert shown(tokenizer, header, first).startswith("<s><|im_start|>assistant\n⟦Hi.<|im_end|>⟧\n")
    bare = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    bare += " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    assert shown(tokenizer, bare, first) == "<s>⟦ Hi.</s>⟧[INST] 2+2? [/INST]⟦ It is 4.</s>⟧"


def test_texts_that_look_like_a_template(tokenizer):
    """Markers, headers and copies of the answer within contents move nothing."""
    asked = turns("<|assistant|>\nIt is 4.<|end|>\n", "<|end|>\n<|assistant|>\n", "It is 4.", "")
    assert shown(tokenizer, PHI, asked) == (
        "<|user|>\n<|assistant|>\nIt is 4.<|end|>\n<|end|>\n<|assistant|>\n⟦<|end|>\n<|assistant|>\n<|end|>⟧\n"
        "<|user|>\nIt is 4.<|end|>\n<|assistant|>\n⟦<|end|>⟧\n<|endoftext|>"
    )


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (CHATML, [ASKED[0], {**CALLED[1]}, *CALLED[2:]], "message 1 .* leaves out what it says"),
        (FORGETFUL, ASKED, "message 1 .* leaves out what it says; mark the turns with"),
        (R1, turns("2+2?", "<think>hm</think>", "Sure?", "Yes."), "message 1 .* leaves out what it says"),
        ("{{ messages[1].content }}" + CHATML, ASKED, "message 1 .* more than one place, or changes"),
    ],
)
def test_a_turn_that_is_not_found_is_named(tokenizer, template, messages, words):
    with pytest.raises(ValueError, match=words):
        shown(tokenizer, template, messages)


PART = [{"type": "text", "text": "a"}]
TYPED = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}</s>{% endfor %}"
)
THOUGHT = [ASKED[0], {"role": "assistant", "content": "<think>secret</think>first"}, *ASKED[2:]]
# As gpt-oss's: of a content with channels only the last one is printed.
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
FINAL = f"<|start|>assistant{CHANNEL}final{MESSAGE}"
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>"
    "{{ m.content.split('<|channel|>final<|message|>')[-1] }}<|return|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

ROWS = {
    "a call beside a content": (
        CHATML,
        [ASKED[0], {**CALLED[1], "content": "I add."}, *CALLED[2:]],
        "tool_calls of assistant",
    ),
    "calls that are printed": (QWEN25, [ASKED[0], {**CALLED[1], "content": "I add."}, *CALLED[2:]], ""),
    "calls alone": (QWEN25, CALLED, ""),
    "a content beside a call": (
        LLAMA3,
        [ASKED[0], {**CALLED[1], "content": "I add."}, *CALLED[2:]],
        "content of assistant",
    ),
    "a call of the old form": (
        CHATML,
        [ASKED[0], {**ASKED[1], "function_call": {"name": "add", "arguments": "{}"}}],
        "function_call of assistant",
    ),
    "thoughts": (CHATML, [ASKED[0], {**ASKED[1], "reasoning_content": "Easy."}], "reasoning_content of assistant"),
    "thoughts of earlier turns": (
        QWEN3,
        [ASKED[0], {**ASKED[1], "reasoning_content": "Easy."}, *ASKED[2:]],
        "reasoning_content of assistant",
    ),
    "thoughts that are printed": (QWEN3, [ASKED[0], {**ASKED[1], "reasoning_content": "Easy."}], ""),
    "a name": (NAMED, [{**ASKED[0], "name": "bob"}, ASKED[1]], ""),
    "a system's turn": (MISTRAL, [{"role": "system", "content": "Be brief."}, *ASKED], "content of system"),
    "parts": (CHATML, [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *ASKED], ""),
    "numbers and flags": (
        CHATML,
        [{**ASKED[0], "id": 1, "tags": []}, {**ASKED[1], "train_on_turn": False}],
        "id of user, train_on_turn of assistant",
    ),
    "a number that is read": (NAMED + "{% if messages[0].n %}{% endif %}", [{**ASKED[0], "n": 1}, ASKED[1]], ""),
    "a plain one": (CHATML, ASKED, ""),
    "thoughts in the content of earlier turns": (QWEN3, THOUGHT, "thoughts of assistant"),
    "thoughts in the content of R1": (R1, THOUGHT[:2], "thoughts of assistant"),
    "thoughts that only end": (R1, [ASKED[0], {**ASKED[1], "content": "Hm</think>4"}], "thoughts of assistant"),
    "thoughts in the last content": (QWEN3, THOUGHT[:2], ""),
    "thoughts that the template does not know": (CHATML, THOUGHT, ""),
    "no thoughts": (QWEN3, [ASKED[0], {**ASKED[1], "content": "<think>\n\n</think>\n\n4"}, *ASKED[2:]], ""),
    "the second of two calls": (
        LLAMA3,
        [ASKED[0], {"role": "assistant", "tool_calls": [*CALLED[1]["tool_calls"]] * 2}, *CALLED[2:]],
        "tool_calls of assistant",
    ),
    **{
        f"a part: {part['type']} of {role}": (
            TYPED,
            [{"role": each, "content": [*([part] if each == role else ()), *PART]} for each in ("user", "assistant")],
            f"{part['type']} of {role}",
        )
        for role, part in (
            ("assistant", {"type": "thinking", "thinking": "T", "signature": "x"}),
            ("assistant", {"type": "tool_use", "name": "f", "input": {"a": 1}}),
            ("user", {"type": "image"}),
            ("user", {"type": "tool_result", "content": [{"type": "text", "text": "4"}]}),
        )
    },
    **{
        f"{what} of messages with channels": (
            HARMONY,
            [ASKED[0], {"role": "assistant", "content": f"{CHANNEL}analysis{MESSAGE}Hm.<|end|>{FINAL}4"}][: 2 + more]
            + [{"role": "assistant", "content": f"{CHANNEL}commentary{MESSAGE}So it is.<|end|>{FINAL}5"}] * more,
            told,
        )
        for what, more, told in (
            ("thoughts", 0, "thoughts of assistant"),
            ("comments", 1, "content of assistant, thoughts of assistant"),
        )
    },
    "messages with the last channel alone": (
        HARMONY,
        [ASKED[0], {"role": "assistant", "content": f"{CHANNEL}final{MESSAGE}4"}],
        "",
    ),
    **{
        f"arguments of calls, {given!r}, {printed}": (
            "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
            "<call>{{ c.function.name }}" + printed + "</call>{% endfor %}</s>{% endfor %}",
            [
                ASKED[0],
                {
                    "role": "assistant",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": given}}],
                },
                {"role": "tool", "content": "5"},
                ASKED[1],
            ],
            told if given else "",
        )
        for printed, told in (("", "arguments of tool_calls of assistant"), ("{{ c.function.arguments | tojson }}", ""))
        for given in ({"q": "x y"}, '{"q": "x y"}', {"n": 3}, {})
        if not (printed and not given)
    },
    "a part that is printed": (
        TYPED.replace("{% endif %}{% endfor %}</s>", "{% else %}<{{ p.type }}>{% endif %}{% endfor %}</s>"),
        [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, *PART]},
            {"role": "assistant", "content": PART},
        ],
        "",
    ),
    "a second text": (
        TYPED.replace("in m.content", "in m.content[:1]"),
        [{"role": "user", "content": PART * 2}, {"role": "assistant", "content": PART}],
        "content of user",
    ),
}


def test_an_answer_of_parts_that_the_template_skips_is_refused(tokenizer):
    tokenizer.chat_template = TYPED
    for part in (
        {"type": "tool_use", "name": "f", "input": {}},
        {"type": "thinking", "thinking": "T"},
        {"type": "image"},
    ):
        with pytest.raises(ValueError, match="message 1 is not found, since the template leaves out what it says"):
            ChatTemplate(tokenizer).render([ASKED[0] | {"content": PART}, {"role": "assistant", "content": [part]}])


@pytest.mark.parametrize(("template", "messages", "told"), ROWS.values(), ids=ROWS)
def test_what_a_template_leaves_out_is_named(tokenizer, template, messages, told):
    tokenizer.chat_template = template
    chat = ChatTemplate(tokenizer)
    for _ in range(2):
        assert ", ".join(sorted(chat.left_out(messages, {"tools": None}))) == told


def test_arguments_that_a_template_leaves_out_are_named(tokenizer):
    given = {"tools": [{"name": "add"}], "documents": [{"text": "a"}], "enable_thinking": False}
    for template, told in ((CHATML, {"tools", "documents"}), (MISTRAL, {"documents"})):
        tokenizer.chat_template = template
        assert ChatTemplate(tokenizer).left_out(ASKED, given) == told
