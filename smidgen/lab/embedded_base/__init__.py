"""How the embedded base model is made, from drawn pictures to the shipped folder.

``python -m smidgen.lab.embedded_base --stage all`` runs, in order: `render` (draw the world), `judge`
(train the readers that score pictures), `autoencoder` (train the VAE), `latents` (freeze the encoder, encode once),
`diffusion` (train UNet and text encoder), `decoder` (fine-tune the decoder alone), `export` (write the pipeline
folder), `card` (model card). Every stage resumes from its own checkpoint; `--preset debug` runs all of it in seconds.
"""
