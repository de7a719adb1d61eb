"""What was trained is generated, and ends by itself, whatever the template's end of a turn is to the base."""

import pytest
from training_setup import chat, make_base, make_data, make_model, make_settings

from genieblue.serving.conversation import Chat
from genieblue.training.stages import train

ANSWER = "\nRed."
TEMPLATES = {
    # Generation of the tiny base stops at `</s>` alone; `<|system|>` plays the part of ChatML's `<|im_end|>`.
    "an end that does not stop": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|system|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "a thought before the last answer": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_learned_answer_is_generated_and_ends_by_itself_in_each_turn(name, tmp_path):
    base = make_base(tmp_path / "base")
    model, processor = make_model(base, lora_rank=16, lora_dropout=0.0)
    processor.tokenizer.chat_template = TEMPLATES[name]
    image = make_data()[0]["images"][0]
    sample = chat("<image>\nWhich colour?", ANSWER, image)
    sample["messages"] += chat("And now?", " 7.")["messages"]
    settings = make_settings(steps=20, batch_size=1, learning_rate=3e-2, warmup_steps=5)
    train(model, processor, [sample], tmp_path / "out", settings)
    conversation = Chat(model, processor)
    for question, images, answer in (("Which colour?", [image], ANSWER), ("And now?", [], " 7.")):
        given = conversation.ask(question, images, max_new_tokens=40)
        assert given["text"] == answer and given["generated_tokens"] < 40
