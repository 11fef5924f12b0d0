"""Prompts of chats: the template, and the text around their image."""

from .tokenization_mmgem import IMAGE_TOKEN


# The image of a chat, which no text can spell, because NUL is removed from texts.
CHAT_IMAGE = "\0" + IMAGE_TOKEN
# The texts of a chat stand around its image unchanged: the model continues captions, it follows no instructions.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content is string %}{{ message.content | replace('\\x00', '') }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '\\x00<image>' }}"
    "{% elif part.type == 'text' %}{{ part.text | replace('\\x00', '') }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def around_image(text: str, index: int) -> tuple[str, str]:
    """The text of a prompt before and behind its placeholder; the other texts of a chat may spell `<image>` too."""
    token = CHAT_IMAGE if CHAT_IMAGE in text else IMAGE_TOKEN
    before, _, behind = text.partition(token)
    if token in behind:
        raise ValueError(
            f"text[{index}] holds {text.count(token)} {IMAGE_TOKEN}, but a caption is of one image. With "
            'task="caption" they are letters of the text.'
        )
    return before, behind
