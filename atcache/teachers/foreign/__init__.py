"""Teachers that timm does not make: from Hugging Face transformers, from OpenCLIP, or a module of the user's own.

- `names`: the names that caches give them
- `loaded`: what each of the three gives, and the inputs they are described with
- `hugging_face`: models of the library transformers
- `image_processor`: the input that a transformers model was made for
- `open_clip_models`: models of the library OpenCLIP
- `reach`: whether the Hugging Face hub can be reached
- `own`: a module of one's own, and what identifies it
"""
