"""
Trains a stage of MM-GEM, evaluates it, and saves a checkpoint or an adapter.

    accelerate launch train.py --config configs/scenes.yaml [--any_option value]
    python train.py --train_file pairs.parquet --caption_column captions --output_dir outputs/mine --max_steps 1000
    python train.py --config configs/scenes-region-caption.yaml --init_from outputs/scenes
"""

from mmgem.cli.train import main


if __name__ == "__main__":
    main()
